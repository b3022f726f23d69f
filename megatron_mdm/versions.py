"""The tested versions of what this package builds on, and the versions that are installed.

It imports neither torch nor Megatron, so that it can refuse a version before an import of it fails.
"""

import platform
import runpy
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of_distribution
from importlib.util import find_spec
from pathlib import Path

from packaging.version import Version

from megatron_mdm.errors import UserError


def release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version, without its suffixes.

    A checkout calls itself 0.19.0rc0, 0.19.0a1 or 0.19.0+abc before and after 0.19.0: all of these
    are (0, 19, 0).

    Args:
        version: a version as PEP 440 writes it.

    Raises:
        packaging.version.InvalidVersion: it is not written so; a `ValueError`.
    """
    return (*Version(version).release, 0, 0, 0)[:3]


@dataclass(frozen=True)
class Tested:
    """The versions of a package that were tested.

    The last version counts to the precision in which it is written: 3.12.9 is not newer than 3.12.
    """

    name: str
    """Name of the distribution, or Python."""
    first: str
    last: str

    def is_older(self, version: str) -> bool:
        """Whether a version comes before the first tested one."""
        return release(version) < release(self.first)

    def is_newer(self, version: str) -> bool:
        """Whether a version comes after the last tested one."""
        numbers = self.last.count(".") + 1
        return release(version)[:numbers] > release(self.last)[:numbers]

    def includes(self, version: str) -> bool:
        """Whether a version is in the tested range."""
        return not self.is_older(version) and not self.is_newer(version)

    def __str__(self) -> str:
        """The range in words, without the name."""
        return self.first if self.first == self.last else f"{self.first} to {self.last}"


@dataclass(frozen=True)
class Needed:
    """A part of a package that we need, and that older versions lack."""

    name: str
    since: str
    """The first version that has it."""
    use: str
    """The part of ours that needs it."""


PYTHON = Tested("Python", "3.12", "3.12")
TORCH = Tested("torch", "2.11.0", "2.11.0")
MEGATRON = Tested("megatron-core", "0.19.0", "0.19.2")
TRANSFORMER_ENGINE = Tested("transformer-engine", "2.20.2", "2.20.2")
TESTED = {tested.name: tested for tested in (PYTHON, TORCH, MEGATRON, TRANSFORMER_ENGINE)}

NEEDED_OF_MEGATRON = (Needed("megatron.training.models.gpt", "0.19.0", "the model"),)
# Without dependencies: pip would otherwise be free to replace a container's torch.
INSTALL_MEGATRON = f"pip install --no-deps {MEGATRON.name}=={MEGATRON.last}"


def installed(name: str) -> str | None:
    """The version of a package that Python would import, or None without it.

    A checkout of Megatron on PYTHONPATH need not be known to pip, or comes before the version that
    pip knows. The version of Megatron is therefore read from its source.

    Args:
        name: name of the distribution, or Python.
    """
    if name == PYTHON.name:
        return platform.python_version()
    if name == MEGATRON.name:
        folder = megatron_folder()
        return None if folder is None else _version_of_source(folder)
    try:
        return version_of_distribution(name)
    except PackageNotFoundError:
        return None


def megatron_folder() -> Path | None:
    """The folder of megatron.core that Python would import, or None without Megatron."""
    try:
        spec = find_spec("megatron.core")
    except ModuleNotFoundError:  # there is no megatron at all
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _version_of_source(folder: Path) -> str:
    version = str(runpy.run_path(str(folder / "package_info.py"))["__version__"])
    # Megatron adds the commit of the git repository around its folder, which for an environment
    # inside of another project is a commit of that project.
    return version.partition("+")[0]


def check_megatron() -> str | None:
    """Checks the version of Megatron that Python would import.

    Returns:
        A line that warns of a version that is newer than the tested ones, or None.

    Raises:
        UserError: there is no Megatron, or this version is known to lack a part that we need.
    """
    version = installed(MEGATRON.name)
    if version is None:
        raise UserError(f"{MEGATRON.name} is not installed: {INSTALL_MEGATRON}")
    for part in NEEDED_OF_MEGATRON:
        if release(version) < release(part.since):
            raise UserError(
                f"{MEGATRON.name} {version} in {megatron_folder()} has no {part.name}, which "
                f"{part.use} needs: {INSTALL_MEGATRON}"
            )
    if not MEGATRON.is_newer(version):
        return None
    return (
        f"warning: {MEGATRON.name} {version} is newer than the tested versions, {MEGATRON}; if it "
        f"fails: {INSTALL_MEGATRON}"
    )
