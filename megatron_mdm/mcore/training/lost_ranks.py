"""Ends a run with one line if the connection to another rank breaks or times out.

Megatron would end with the traceback of the collective call that waited. Nothing is wrong with that
call: another rank has ended, or its machine is lost. With NCCL, PyTorch's watchdog may end the
process before the line is printed.
"""

import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_mdm.errors import LostRankError

# gloo's connection errors, after the position in its source, and NCCL's text of a remote error.
# "enforce fail" is excluded: it means that two ranks' tensors have different sizes.
_GLOO = re.compile(r"^(?!.*enforce fail).*gloo/transport/\S+\] (?P<reason>.*)")
_NCCL = re.compile(r"(?P<reason>remote process exited or there was a network error)")

_START = (
    "Its log may say why. If not, check that each machine's name resolves to an address that the "
    "others can reach (examples/scale/README.md)"
)
_TRAINING = (
    "The log of the node that ended first may say why. The same command goes on from the last "
    "checkpoint"
)


@contextmanager
def lost_ranks_in_a_line(args: Namespace) -> Iterator[None]:
    """Context in which a collective call that lost another rank raises a one-line error.

    Args:
        args: Megatron's arguments.

    Raises:
        LostRankError: names the iteration and the reason that gloo or NCCL gives.
    """
    try:
        yield
    except RuntimeError as error:
        reason = lost_rank(error)
        if reason is None:
            raise
        if not hasattr(args, "curr_iteration"):
            when, hint = "before the first iteration", _START
        else:
            when, hint = f"iteration {args.curr_iteration + 1}", _TRAINING
        raise LostRankError(
            f"{when}: another rank is gone or does not answer ({reason}). {hint}"
        ) from error


def lost_rank(error: RuntimeError) -> str | None:
    """The reason of gloo, NCCL or the ranks' store for a lost rank; None for any other error."""
    text = " ".join(str(error).split())
    if "failed to listen" in text:  # another process uses this rank's port
        return None
    if isinstance(error, torch.distributed.DistNetworkError):
        return text
    found = _GLOO.search(text) or _NCCL.search(text)
    return found["reason"] if found else None
