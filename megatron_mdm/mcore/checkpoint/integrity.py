"""SHA-256 checksums of a checkpoint's files, written before the tracker moves and checked at load.

A bit flip on a disk or in a copy changes weights, and nothing else would detect it. The checksums
are in `integrity.json`, in the format of Megatron's --verify-integrity. That flag makes one rank
hash all files. Here the ranks share the work: each file is read once, by one rank.
"""

import hashlib
import heapq
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME

from megatron_mdm.errors import SharedError, UserError
from megatron_mdm.files import write_text
from megatron_mdm.mcore.checkpoint.unpickling import METADATA, read_metadata
from megatron_mdm.mcore.ranks import notice

ALGORITHM = "sha256"  # the only algorithm that Megatron reads


def remove_sums(path: Path) -> None:
    """Removes the checksums of a checkpoint that was overwritten; a collective call.

    Raises:
        SharedError: they cannot be removed.
    """
    _on_first_rank(lambda: (path / INTEGRITY_FNAME).unlink(missing_ok=True))


def write_sums(path: Path) -> None:
    """Writes the checksums of a checkpoint's files; a collective call.

    Args:
        path: directory of one checkpoint, which all ranks see.

    Raises:
        SharedError: a file cannot be read, or the checksums cannot be written.
    """
    # A shared disk may not yet show the first rank files that other ranks have just written.
    names = _on_first_rank(lambda: sorted({*_sizes(path), *_shards(path)} - {INTEGRITY_FNAME}))
    rank, ranks = _rank_and_size()
    # The rank that wrote a file hashes it, because it still has the file in its page cache.
    own = [name for name in names if _writer(name) % ranks == rank]
    sums = _gathered({name: _sum(path / name) for name in own})
    _raise_unread(path, sums)
    content = {"algorithm": ALGORITHM, "files": dict(sorted(sums.items()))}
    text = json.dumps(content, indent=2) + "\n"
    _on_first_rank(lambda: write_text(str(path / INTEGRITY_FNAME), text))


def check_sums(path: Path) -> None:
    """Compares the files of a checkpoint with their checksums; a collective call.

    If the checkpoint has no checksums, a line says so.

    Args:
        path: directory of one checkpoint, which all ranks see.

    Raises:
        SharedError: on all ranks; a file differs from its checksum, cannot be read, or has none.
    """
    expected = _on_first_rank(lambda: _expected(path))
    if expected is None:
        notice(f"{path} has no {INTEGRITY_FNAME}: nothing tells whether its files are intact")
        return
    sizes = _on_first_rank(lambda: _sizes(path))
    rank, ranks = _rank_and_size()
    own = _shares({name: sizes.get(name, 0) for name in expected}, ranks)[rank]
    sums = _gathered({name: _sum(path / name) for name in own})
    _raise_unread(path, sums)
    wrong = sorted(name for name in expected if sums[name] != expected[name])
    unsummed = [] if wrong else _on_first_rank(lambda: sorted(_shards(path) - expected.keys()))
    if unsummed:
        raise SharedError(
            f"{path / INTEGRITY_FNAME} has no sum of {unsummed[0]}: copy the checkpoint again, or "
            "take another one"
        )
    if wrong:
        raise SharedError(
            f"{path} is damaged: {wrong[0]} is not as it was saved, by its sum in "
            f"{INTEGRITY_FNAME} ({len(wrong)} of {len(expected)} files): copy the checkpoint "
            "again, or take another one"
        )


def _expected(path: Path) -> dict[str, str] | None:
    """The saved checksum of each file; None if there is no file of checksums."""
    try:
        content = json.loads((path / INTEGRITY_FNAME).read_bytes())
        if content["algorithm"] != ALGORITHM:
            raise ValueError(content["algorithm"])
        return {str(name): str(value) for name, value in content["files"].items()}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path / INTEGRITY_FNAME} is damaged: copy the checkpoint again, or take another one"
        ) from error


def _sizes(path: Path) -> dict[str, int]:
    return {entry.name: entry.stat().st_size for entry in os.scandir(path) if entry.is_file()}


def _shards(path: Path) -> set[str]:
    """The files that hold the checkpoint's tensors, according to its index."""
    if not (path / METADATA).exists():
        return set()
    return {
        item.relative_path for item in (read_metadata(path / METADATA).storage_data or {}).values()
    }


def _writer(name: str) -> int:
    """The rank that wrote a file; files of torch_dist are named __RANK_NUMBER.distcp."""
    found = re.match(r"__(\d+)_", name)
    return int(found[1]) if found else 0


def _shares(sizes: dict[str, int], ranks: int) -> list[list[str]]:
    """Divides the files among ranks, with about the same number of bytes for each."""
    shares: list[list[str]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, rank = loads[0]
        shares[rank].append(name)
        heapq.heapreplace(loads, (load + sizes[name], rank))
    return shares


def _sum(path: Path) -> str:
    """The checksum in hexadecimal digits, or the reason why the file cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, ALGORITHM).hexdigest()
    except OSError as error:
        return f"{path.name}: {error.strerror or error}"


def _raise_unread(path: Path, sums: dict[str, str]) -> None:
    reasons = [text for _, text in sorted(sums.items()) if ": " in text]
    if reasons:
        raise SharedError(f"{path} cannot be read whole ({reasons[0]}): copy the checkpoint again")


def _on_first_rank[Result](function: Callable[[], Result]) -> Result:
    """Calls a function on the first rank and returns its result on all ranks; a collective call.

    Raises:
        SharedError: on all ranks, if the function raises a `UserError` or `OSError`.
    """
    answer: list[Any] = [None, None]
    if _rank_and_size()[0] == 0:
        try:
            answer[0] = function()
        except UserError as error:
            answer[1] = str(error)
        except OSError as error:
            answer[1] = f"cannot read {error.filename}: {error.strerror}"
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise SharedError(answer[1])
    result: Result = answer[0]
    return result


def _gathered(own: dict[str, str]) -> dict[str, str]:
    """The merged entries of all ranks; a collective call."""
    if not torch.distributed.is_initialized():
        return own
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, own)
    return {name: value for part in parts for name, value in part.items()}


def _rank_and_size() -> tuple[int, int]:
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
