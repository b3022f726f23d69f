"""Makes Megatron's saving and loading of checkpoints safe: complete trackers, checksums of files.

Megatron has no hook between the last file of a checkpoint and its tracker, so the context below
wraps Megatron's own calls while it is entered.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.training import checkpointing, get_tensorboard_writer

from megatron_mdm.files import complete_or_absent
from megatron_mdm.mcore.checkpoint.files import TRACKER, is_remote
from megatron_mdm.mcore.checkpoint.integrity import check_sums, remove_sums, write_sums
from megatron_mdm.mcore.checkpoint.kept_tokenizer import TokenizerFiles
from megatron_mdm.mcore.device import replaced


@contextmanager
def safe_checkpoints(hashes: bool, tokenizer: TokenizerFiles | None = None) -> Iterator[None]:
    """Context in which Megatron saves and loads checkpoints safely.

    A kill or a full disk leaves the tracker unchanged. Megatron alone would first truncate it.

    Args:
        hashes: whether to write checksums of each checkpoint's files before the tracker moves (also
            in asynchronous saves), and to check them before tensors are read (integrity.py). If
            not, the checksums of an overwritten checkpoint are removed.
        tokenizer: tokenizer to copy beside the checkpoints before the tracker moves; given only on
            the first rank, which writes the tracker.
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
    """Megatron's access to files; a tracker is written under a temporary name and then renamed."""

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
        # A resume writes the scalars after this save again. Those before it must be on disk.
        writer = get_tensorboard_writer()
        if writer is not None:
            writer.flush()
        request = save(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        if is_remote(str(checkpoint_dir)):
            return request
        # Until then, the old checksums of an overwritten checkpoint show that its files are mixed.
        finish = write_sums if hashes else remove_sums
        if request is None:
            finish(Path(checkpoint_dir))
        else:  # Megatron calls finalize functions on all ranks; a later one moves the tracker
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
