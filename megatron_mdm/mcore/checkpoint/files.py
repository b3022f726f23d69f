"""Finds the latest checkpoint in a directory, and checks whether its files are complete.

A run's directory holds one directory per checkpoint, such as `iter_0000100` (or `release` for a
converted model), and the tracker `latest_checkpointed_iteration.txt`, which Megatron updates when a
checkpoint is complete. A full disk, a crash or an interrupted copy leaves only parts of them.
Megatron then trains from random weights, ends with status 0, or raises. Here the run ends with one
line.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_mdm.errors import UserError
from megatron_mdm.mcore.checkpoint.unpickling import METADATA, DamagedError, read_metadata
from megatron_mdm.mcore.ranks import is_first_of_node

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
CONFIG = "metadata.json"
# Megatron's formats that have a .metadata but no metadata.json.
WITHOUT_CONFIG = ("torch_dcp", "fsdp_dtensor")


@dataclass(frozen=True)
class SavedCheckpoint:
    """One checkpoint.

    Attributes:
        directory: directory that --save named.
        iteration: iteration after which it was saved; None for a release.
    """

    directory: str
    iteration: int | None

    @property
    def path(self) -> Path:
        """The directory of its files."""
        return Path(self.directory, _name(self.iteration))

    def __str__(self) -> str:
        return _words(self.iteration)


def is_remote(directory: str) -> bool:
    """Whether a directory is in an object storage, whose files only Megatron can read."""
    return "://" in directory


def find_checkpoint(
    directory: str,
    iteration: int | None = None,
    ckpt_format: str = "torch_dist",
    step_flag: str | None = "--ckpt-step",
) -> SavedCheckpoint | None:
    """The checkpoint that Megatron would load from a directory, if its files are complete.

    The check reads names of files on all ranks, and sizes on the first rank of each node.
    integrity.py checks their contents.

    Args:
        directory: directory that --save named; it need not exist.
        iteration: iteration of the checkpoint; None: the one that the tracker names.
        ckpt_format: Megatron's name of the format that the run reads and writes.
        step_flag: the program's flag that chooses the iteration; None: the program has no such
            flag and always takes the tracker's.

    Returns:
        None if there is no complete checkpoint at all.

    Raises:
        UserError: the checkpoint or the tracker is missing or damaged while other checkpoints
            exist, or the directory is itself a checkpoint. The line names the newest complete one.
    """
    root = Path(directory)
    if _holds_shards(root):
        name = re.fullmatch(r"iter_0*(\d+)", root.name)
        step = f" with {step_flag} {name[1]}" if name and step_flag else ""
        raise UserError(
            f"{directory} is one checkpoint of a run: give the directory above it, {root.parent}"
            f"{step}"
        )
    there = _iterations(root)
    if iteration is not None:
        if iteration not in there:
            raise UserError(
                f"{directory} has no checkpoint of iteration {iteration}: it has "
                f"{', '.join(map(_words, there)) or 'none'}"
            )
        if _read_tracker(root) == RELEASE:
            raise UserError(
                f"{root / TRACKER} says {RELEASE}, which Megatron loads whatever {step_flag} says: "
                f"leave {step_flag} out, or write the iteration into that file"
            )
        return _whole(SavedCheckpoint(directory, iteration), there, ckpt_format, step_flag)
    text = _read_tracker(root)
    if text is None:
        newest = _newest_complete(root, there, ckpt_format)
        if newest is None:
            return None
        raise UserError(f"{directory} has no {TRACKER}: {_remedy(root, newest)}")
    if not re.fullmatch(rf"[0-9]+|{RELEASE}", text):
        newest = _newest_complete(root, there, ckpt_format)
        raise UserError(
            f"{root / TRACKER} is damaged, it holds {text[:40]!r} instead of an iteration: "
            f"{_remedy(root, newest)}"
        )
    latest = SavedCheckpoint(directory, None if text == RELEASE else int(text))
    return _whole(latest, there, ckpt_format)


def _whole(
    checkpoint: SavedCheckpoint,
    there: list[int | None],
    ckpt_format: str,
    step_flag: str | None = None,
) -> SavedCheckpoint:
    """Returns the checkpoint if it is complete.

    Args:
        checkpoint: the checkpoint to be loaded.
        there: iterations of the checkpoints in its directory.
        ckpt_format: see `find_checkpoint`.
        step_flag: the flag that has chosen its iteration; None: the tracker has.

    Raises:
        UserError: it is not complete.
    """
    wrong = problem(checkpoint.path, ckpt_format)
    if wrong:
        # Checkpoints with later iterations were left behind when the run went back to an earlier
        # one. They come last as a remedy.
        before = [i for i in there if (i or 0) < (checkpoint.iteration or 0)]
        after = [i for i in there if i not in before and i != checkpoint.iteration]
        root = Path(checkpoint.directory)
        newest = _newest_complete(root, [*after, *before], ckpt_format)
        step = None if newest is None else newest.iteration
        is_before = newest is not None and step in before
        remedy = _remedy(root, newest, " before it" if is_before else "")
        if step_flag and is_before and step is not None:
            remedy = f"take the newest complete one before it, {step_flag} {step}"
        raise UserError(f"{checkpoint.path} {wrong}: {remedy}")
    return checkpoint


def problem(path: Path, ckpt_format: str = "torch_dist") -> str:
    """Describes what a checkpoint lacks; empty if it is complete by names and sizes of its files.

    Args:
        path: directory of one checkpoint.
        ckpt_format: see `find_checkpoint`.

    Raises:
        UserError: its .metadata could run code.
    """
    if not path.is_dir():
        return "does not exist"
    names = set(os.listdir(path))
    if _are_pickles(names):
        return ""
    if wrong := _lacks(names, ckpt_format):
        return wrong
    if CONFIG in names and not _is_config(path / CONFIG):
        return f"has a damaged {CONFIG}"
    if not is_first_of_node():
        return ""  # one check of each file per node is enough, even with thousands of ranks
    try:
        metadata = read_metadata(path / METADATA)
    except DamagedError:
        return f"has a damaged {METADATA}"
    ends: dict[str, int] = {}
    for item in (metadata.storage_data or {}).values():
        ends[item.relative_path] = max(ends.get(item.relative_path, 0), item.offset + item.length)
    for name, end in sorted(ends.items()):
        if name not in names:
            return f"lacks its {name}"
        size = (path / name).stat().st_size
        if size < end:
            return f"has a {name} that is cut short, {size} bytes of {end}"
    return ""


def unfinished(directory: str, ckpt_format: str = "torch_dist") -> list[str]:
    """Names of the checkpoints that a killed save or deletion has left incomplete.

    Args:
        directory: directory that --save named; it need not exist.
        ckpt_format: see `find_checkpoint`.
    """
    root = Path(directory)
    found = []
    for name in map(_name, _iterations(root)):
        names = set(os.listdir(root / name))
        if not _are_pickles(names) and _lacks(names, ckpt_format):
            found.append(name)
    return found


def _are_pickles(names: set[str]) -> bool:
    """Whether these files are of Megatron's format `torch`: a pickle for each rank."""
    return any(name.startswith("mp_rank_") for name in names)


def _lacks(names: set[str], ckpt_format: str) -> str:
    """Says which of the files that are written last a checkpoint lacks; empty if none."""
    if METADATA not in names:
        return f"lacks its {METADATA}"
    if CONFIG not in names and ckpt_format not in WITHOUT_CONFIG:
        return f"lacks its {CONFIG}, which is written last"
    return ""


def _is_config(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes())["sharded_backend"], str)
    except (ValueError, KeyError, TypeError):
        return False


def _holds_shards(path: Path) -> bool:
    return (path / METADATA).exists() or (path / CONFIG).exists()


def _iterations(root: Path) -> list[int | None]:
    """Iterations of the checkpoint directories, ascending; a release comes first, as None."""
    if not root.is_dir():
        return []
    names = os.listdir(root)
    numbers = [int(found[1]) for name in names if (found := re.fullmatch(r"iter_(\d+)", name))]
    return [None] * (RELEASE in names) + sorted(numbers)


def _newest_complete(
    root: Path, iterations: list[int | None], ckpt_format: str
) -> SavedCheckpoint | None:
    candidates = (SavedCheckpoint(str(root), iteration) for iteration in reversed(iterations))
    return next((c for c in candidates if not problem(c.path, ckpt_format)), None)


def _remedy(root: Path, newest: SavedCheckpoint | None, which: str = "") -> str:
    if newest is None:
        return "no complete checkpoint is left there; give another directory"
    text = RELEASE if newest.iteration is None else newest.iteration
    return (
        f"the newest complete checkpoint{which} is {newest}; to take it: echo {text} > "
        f"{root / TRACKER}"
    )


def _read_tracker(root: Path) -> str | None:
    """The text of the tracker; None if there is no such file."""
    try:
        return (root / TRACKER).read_bytes().decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {root / TRACKER}: {error.strerror or error}") from error


def _name(iteration: int | None) -> str:
    return RELEASE if iteration is None else f"iter_{iteration:07d}"


def _words(iteration: int | None) -> str:
    return RELEASE if iteration is None else f"iteration {iteration}"
