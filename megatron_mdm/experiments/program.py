"""Which program a result comes from, so that the results of two are never mixed."""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import subprocess

import megatron_mdm

# What a run may come from, beside the package itself.
CODE = ("megatron_mdm", "tools", "examples")
LIBRARIES = ("torch", "megatron-core", "transformer-engine", "apex")


@functools.cache
def program() -> str:
    """The program of this process: what it was when this was first called.

    Of a checkout its commit, and a digest of what is not committed. Elsewhere, as where the package
    is installed, a digest of the package's files. The versions of the libraries that compute.
    """
    return program_now()


def program_now() -> str:
    """The program as it stands on the disk, from which a run that starts now is made."""
    versions = []
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join([program_in(pathlib.Path(megatron_mdm.__file__).parents[1]), *versions])


def program_in(root: pathlib.Path) -> str:
    """The code in a directory; see `program`.

    Args:
        root: where the package `megatron_mdm` is.
    """
    code = [f"{folder}/*.py" for folder in CODE]
    answers = [
        # The directory may lie in the checkout of something else, which does not know the package.
        _git(root, "ls-files", "--error-unmatch", "megatron_mdm/__init__.py"),
        _git(root, "rev-parse", "HEAD"),
        _git(root, "diff", "--name-only", "--relative", "--no-renames", "-z", "HEAD", "--", *code),
        _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *code),
    ]
    known = [answer for answer in answers if answer is not None]
    if len(known) < len(answers):
        return f"files {_digest(root, sorted((root / 'megatron_mdm').rglob('*.py')))}"
    _, commit, changed, new = known
    names = sorted(name for name in (changed + new).split("\0") if name)
    changes = f", changes {_digest(root, [root / name for name in names])}" if names else ""
    return f"commit {commit.strip()}{changes}"


def _git(root: pathlib.Path, *words: str) -> str | None:
    """What git says, None if it fails or is not there. Names are relative to the directory."""
    command = ["git", "-C", str(root), *words]
    try:
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return None
    return os.fsdecode(ended.stdout) if ended.returncode == 0 else None


def _digest(root: pathlib.Path, paths: list[pathlib.Path]) -> str:
    """A digest of files and their names; a file that is gone counts as gone."""
    result = hashlib.sha256()
    for path in paths:
        content = path.read_bytes() if path.is_file() else None
        size = "gone" if content is None else len(content)
        result.update(f"{path.relative_to(root)} {size}\n".encode("utf-8", "surrogateescape"))
        result.update(content or b"")
    return result.hexdigest()[:16]
