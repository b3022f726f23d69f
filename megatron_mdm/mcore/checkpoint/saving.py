"""Megatron's saving and loading of checkpoints, made safe: whole trackers, sums of the files.

Megatron has no hook between the last file of a checkpoint and its tracker, so that its own calls
are wrapped for as long as the context below is entered.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.training import checkpointing

from megatron_mdm.files import complete_or_absent
from megatron_mdm.mcore.checkpoint.files import TRACKER, is_remote
from megatron_mdm.mcore.checkpoint.integrity import check_sums, remove_sums, write_sums
from megatron_mdm.mcore.checkpoint.kept_tokenizer import TokenizerFiles
from megatron_mdm.mcore.device import replaced


@contextmanager
def safe_checkpoints(hashes: bool, tokenizer: TokenizerFiles | None = None) -> Iterator[None]:
    """Context in which Megatron saves and loads checkpoints.

    A kill or a full disk leaves the tracker as it was: Megatron alone would empty it first.

    Args:
        hashes: write the sums of each checkpoint's files before the tracker moves, of an
            asynchronous save too, and check them before tensors are read (integrity.py). Without,
            sums of a checkpoint that was saved over are removed.
        tokenizer: to be kept beside the checkpoints, before the tracker moves; given on the first
            rank, which writes the tracker.
    """
    with ExitStack() as stack:
        files = _WholeTracker(checkpointing.maybe_msc, tokenizer)
        stack.enter_context(replaced(checkpointing, "maybe_msc", files))
        save, load = dist_checkpointing.save, dist_checkpointing.load
        stack.enter_context(replaced(dist_checkpointing, "save", _with_sums(save, hashes)))
        if hashes:
            stack.enter_context(replaced(dist_checkpointing, "load", _checked(load)))
        yield


class _WholeTracker:
    """Megatron's access to files, except that a tracker is written and then renamed."""

    def __init__(self, files: Any, tokenizer: TokenizerFiles | None) -> None:
        self._files = files
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def open(self, path: str, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """Opens a file."""
        if mode == "w" and Path(path).name == TRACKER and not is_remote(str(path)):
            if self._tokenizer is not None:
                self._tokenizer.keep(Path(path).parent)
            return _renamed_when_written(str(path))
        return self._files.open(path, mode, *args, **kwargs)


@contextmanager
def _renamed_when_written(path: str) -> Iterator[Any]:
    with complete_or_absent(path) as (name,), open(name, "w", encoding="utf-8") as file:
        yield file
        file.flush()


def _with_sums(save: Any, hashes: bool) -> Any:
    def save_with_sums(
        sharded_state_dict: Any, checkpoint_dir: str, *args: Any, **kwargs: Any
    ) -> Any:
        request = save(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        if is_remote(str(checkpoint_dir)):
            return request
        # Until then the sums of a checkpoint that is saved over tell that its files are mixed.
        finish = write_sums if hashes else remove_sums
        if request is None:
            finish(Path(checkpoint_dir))
        else:  # Megatron calls these on all ranks, and moves the tracker in a later one
            request.add_finalize_fn(lambda: finish(Path(checkpoint_dir)))
        return request

    return save_with_sums


def _checked(load: Any) -> Any:
    def checked_load(
        sharded_state_dict: Any, checkpoint_dir: str, *args: Any, **kwargs: Any
    ) -> Any:
        if not is_remote(str(checkpoint_dir)):
            check_sums(Path(checkpoint_dir))
        return load(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    return checked_load
