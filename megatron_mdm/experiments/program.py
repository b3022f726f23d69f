"""Identifies the program version of a result, so that results of two versions are never mixed."""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import subprocess

import megatron_mdm

# Directories of a checkout with code that can affect a run.
CODE = ("megatron_mdm", "tools", "examples")
LIBRARIES = ("torch", "megatron-core", "transformer-engine", "apex")


@functools.cache
def program() -> str:
    """The program version of this process, at the time of the first call.

    For a git checkout: the commit, and a digest of uncommitted changes. For an installed package: a
    digest of its files. In both cases also the versions of `LIBRARIES`.
    """
    return program_now()


def program_now() -> str:
    """The program version that is on disk now, which a new run would use; see `program`."""
    versions = []
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join([program_in(pathlib.Path(megatron_mdm.__file__).parents[1]), *versions])


def program_in(root: pathlib.Path) -> str:
    """The version of the code in a directory, without libraries; see `program`.

    Args:
        root: directory that contains the package `megatron_mdm`.
    """
    code = [f"{folder}/*.py" for folder in CODE]
    answers = [
        # Fails if the directory is inside the checkout of another project.
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
    """Output of a git command in a directory; None if git fails or is not installed."""
    command = ["git", "-C", str(root), *words]
    try:
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return None
    return os.fsdecode(ended.stdout) if ended.returncode == 0 else None


def _digest(root: pathlib.Path, paths: list[pathlib.Path]) -> str:
    """A digest of the names and contents of files; a missing file is included as `gone`."""
    result = hashlib.sha256()
    for path in paths:
        content = path.read_bytes() if path.is_file() else None
        size = "gone" if content is None else len(content)
        result.update(f"{path.relative_to(root)} {size}\n".encode("utf-8", "surrogateescape"))
        result.update(content or b"")
    return result.hexdigest()[:16]
