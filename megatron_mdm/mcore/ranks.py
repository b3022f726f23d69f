"""This process's rank among the processes that a launcher started."""

import contextlib
import os
from collections.abc import Iterator
from typing import TextIO

import torch
from megatron.core import parallel_state

from megatron_mdm.errors import escaped


def is_first_rank() -> bool:
    """Whether this is the first rank of all."""
    return os.environ.get("RANK", "0") == "0"


def is_first_of_node() -> bool:
    """Whether this is the first rank of its node."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def equal_on_all_ranks(digest: str) -> bool:
    """Whether all ranks have the same hexadecimal digest; a collective call of 16 bytes."""
    number = int(digest[:15], 16)
    ends = torch.tensor([number, -number], device=torch.cuda.current_device())
    torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MAX)
    return bool(ends[0] == -ends[1])


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """Context with Megatron's process groups for this single process: gloo, without a network."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def notice(text: str, file: TextIO | None = None) -> None:
    """Prints a line that tells a user what a run or a tool does. Only the first rank prints it.

    Args:
        text: the line; characters that cannot be shown are escaped.
        file: where the line goes; None: stdout.
    """
    if is_first_rank():
        print(escaped(text), file=file, flush=True)
