"""The tested versions of what this package builds on, and the versions that are installed.

It imports neither torch nor Megatron, so that it can refuse a version before an import of it fails.
"""

import platform
import runpy
from collections.abc import Collection
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
    """The versions of a package that were tested, or checked in another way.

    The last version counts to the precision in which it is written: 3.12.9 is not newer than 3.12.
    """

    name: str
    """Name of the distribution, or Python."""
    first: str
    last: str
    word: str = "tested"
    """How the versions were checked."""

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
# A test builds the layers with 2.20.2. Of the other versions the sources were read: they have every
# name that Megatron 0.19 imports for our flags, or Megatron does without it.
TRANSFORMER_ENGINE = Tested("transformer-engine", "2.14", "2.20", "sources read")
TESTED = {tested.name: tested for tested in (PYTHON, TORCH, MEGATRON, TRANSFORMER_ENGINE)}

NEEDED_OF_MEGATRON = (Needed("megatron.training.models.gpt", "0.19.0", "the model"),)
# What the flags in `use` need. MXFP8BlockScaling is in 2.0 already, but Megatron requires 2.1. For
# NVFP4BlockScaling Megatron requires 2.7, where it is still missing.
NEEDED_OF_TRANSFORMER_ENGINE = (
    Needed("MXFP8BlockScaling", "2.1.0", "--fp8-recipe mxfp8"),
    Needed("Float8CurrentScaling", "2.2.0", "--fp8-recipe tensorwise"),
    Needed("Float8BlockScaling", "2.3.0", "--fp8-recipe blockwise"),
    Needed("NVFP4BlockScaling", "2.8.0", "--fp4-format"),
)
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


def missing_part(version: str, flags: Collection[str]) -> str | None:
    """The part that a version of Transformer Engine lacks, and the remedy; None if it has all.

    Args:
        version: version of Transformer Engine.
        flags: flags of a run, each written as in `NEEDED_OF_TRANSFORMER_ENGINE`.
    """
    for part in NEEDED_OF_TRANSFORMER_ENGINE:
        if part.use in flags and release(version) < release(part.since):
            return (
                f"{TRANSFORMER_ENGINE.name} {version} has no {part.name}, which {part.use} needs "
                f"and which {part.since} brought: leave the flag out, or use a container or an "
                "environment with a newer one"
            )
    return None


def check_transformer_engine(flags: Collection[str]) -> str | None:
    """Checks the version of Transformer Engine, for a run that uses it.

    Args:
        flags: flags of the run, as in `missing_part`.

    Returns:
        A line that warns of a version outside of `TRANSFORMER_ENGINE`, or None. It is also None if
        the version is unknown, as for a source tree that pip has not installed.

    Raises:
        UserError: this version is known to lack a part that one of the flags needs.
    """
    tested = TRANSFORMER_ENGINE
    version = installed(tested.name)
    if version is None:
        return None
    if line := missing_part(version, flags):
        raise UserError(line)
    if tested.includes(version):
        return None
    return (
        f"warning: {tested.name} {version} is {'older' if tested.is_older(version) else 'newer'} "
        f"than the versions whose sources were read, {tested}"
    )
