"""A connection to another rank that breaks, or stays silent for too long, ends the run with a line.

Megatron would end with the traceback of the collective call that waited. Nothing is wrong with that
call: another rank has ended, or its machine is lost. With NCCL, PyTorch's watchdog may end the
process before this line.
"""

import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_mdm.errors import LostRankError

# What gloo says of its connections, after the place in its source, unless a tensor has another size
# than the other rank's ("enforce fail"), and NCCL's text of a remote error.
_GLOO = re.compile(r"^(?!.*enforce fail).*gloo/transport/\S+\] (?P<reason>.*)")
_NCCL = re.compile(r"(?P<reason>remote process exited or there was a network error)")

_START = (
    "Its log may say why; if not: each machine's own name has to resolve to an address that the "
    "others reach (examples/scale/README.md)"
)
_TRAINING = (
    "The log of the node that ended first says why, if it still could. The same command goes on "
    "from the last checkpoint"
)


@contextmanager
def lost_ranks_in_a_line(args: Namespace) -> Iterator[None]:
    """Context in which a collective call that lost another rank raises one line.

    Args:
        args: Megatron's arguments.

    Raises:
        LostRankError: says the iteration and the reason that gloo or NCCL gives.
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
    """The reason by which gloo, NCCL or the store of the ranks says so; None: another error."""
    text = " ".join(str(error).split())
    if "failed to listen" in text:  # the port of this rank is taken
        return None
    if isinstance(error, torch.distributed.DistNetworkError):
        return text
    found = _GLOO.search(text) or _NCCL.search(text)
    return found["reason"] if found else None
