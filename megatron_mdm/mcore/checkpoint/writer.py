"""The program of the process that writes the checkpoints of a rank in the background.

It imports Megatron only after it has prepared the environment.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_mdm.config import requested_device
from megatron_mdm.environment import prepare_environment
from megatron_mdm.interruption import end_with_parent


def write_checkpoints(rank: int, *queues_and_settings: Any) -> None:
    """Runs the loop of Megatron's worker, on the device of its rank.

    Args:
        rank: the rank whose checkpoints it writes; the process ends when the rank ends.
        queues_and_settings: the arguments of `PersistentAsyncCaller.async_loop` after the rank.
    """
    end_with_parent()
    device = requested_device()
    prepare_environment(device)
    from megatron_mdm.mcore.device import replaced, training_device

    with training_device(device):
        from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
        from megatron.core.dist_checkpointing.strategies.filesystem_async import (
            FileSystemWriterAsync,
        )

        preload = staticmethod(partial(preload_copies, FileSystemWriterAsync.preload_tensors))
        with replaced(FileSystemWriterAsync, "preload_tensors", preload):
            PersistentAsyncCaller.async_loop(rank, *queues_and_settings)


def preload_copies(preload: Callable, write_buckets: list, non_blocking: bool = True) -> list:
    """Copies tensors to host memory as Megatron does, including tensors that are already there.

    Tensors in host memory are shared with the rank, which changes them after this function returns.
    """
    copied = [
        (name, key, (data, [(item, x.clone() if x.is_cpu else x) for item, x in tensors]))
        for name, key, (data, tensors) in write_buckets
    ]
    result: list = preload(copied, non_blocking)
    return result
