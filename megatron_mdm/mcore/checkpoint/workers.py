"""The processes that write checkpoints in the background with --async-save; none without it.

This module extends Megatron's worker: the worker ends when its rank ends, and the rank ends when
the worker dies; a signal to the process group does not reach the worker; and on a CPU the tensors
that it writes are copied first.
"""

import multiprocessing
import os
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.managers import SyncManager
from typing import Any

from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

from megatron_mdm.interruption import children_without_signals, end_with_parent
from megatron_mdm.mcore.checkpoint.writer import write_checkpoints
from megatron_mdm.mcore.device import replaced


@contextmanager
def checkpoint_workers(is_async: bool) -> Iterator[None]:
    """Context in which Megatron writes checkpoints of torch_dist.

    Args:
        is_async: whether --async-save is given. Without it, the rank writes checkpoints itself and
            no process is started. Megatron would start one that takes half a gigabyte, only for a
            queue from the rank to itself.
    """
    if not is_async:
        with replaced(filesystem_async, "_results_queue", queue.Queue()):
            yield
        return
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    with children_without_signals():
        manager.start(initializer=end_with_parent)
    try:
        with (
            replaced(filesystem_async, "_results_queue", manager.Queue()),
            replaced(async_utils, "PersistentAsyncCaller", CheckpointWorker),
        ):
            yield
    finally:
        CheckpointWorker.kill()
        manager.shutdown()


class CheckpointWorker(PersistentAsyncCaller):
    """Megatron's worker, one per rank; its death ends the rank."""

    async_loop = staticmethod(write_checkpoints)
    _may_end = threading.Event()

    @classmethod
    def _get_process(cls, rank: int, mp_mode: str = "spawn", *priorities: Any, **named: Any) -> Any:
        """Starts the worker as a direct child of this rank, without a fork server between them."""
        if cls._persistent_process is None:
            cls._may_end = threading.Event()
            with children_without_signals():
                process = super()._get_process(rank, "spawn", *priorities, **named)
            # Megatron waits for the worker's answers in four places, each without a timeout.
            threading.Thread(
                target=_end_with_worker, args=(process, cls._may_end, rank), daemon=True
            ).start()
        return cls._persistent_process

    def close(self, abort: bool = False) -> None:
        """Waits until the worker ends."""
        type(self)._may_end.set()
        super().close(abort)

    @classmethod
    def kill(cls) -> None:
        """Ends a worker that was not closed, because the run failed or saved nothing."""
        cls._may_end.set()
        if cls._persistent_process is not None:
            cls._persistent_process.kill()
            cls._persistent_process.join()
            cls._persistent_process = None


def _end_with_worker(process: Any, may_end: threading.Event, rank: int) -> None:
    wait([process.sentinel])
    if may_end.is_set():
        return
    process.join()
    code = process.exitcode
    how = f"by signal {-code}" if code < 0 else f"with status {code}"
    print(
        f"error: rank {rank}: the process that writes checkpoints ended {how} (memory may have run "
        "out): the last whole checkpoint is the latest; start the same command again to go on "
        "from it",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # the main thread may be waiting for the dead worker
