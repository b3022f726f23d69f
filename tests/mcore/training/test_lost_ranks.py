"""Which errors of collective calls mean that another rank is gone.

tests/examples/test_two_nodes.py tests a run that loses a rank.
"""

import argparse
import datetime

import pytest
import torch

from megatron_mdm.errors import LostRankError
from megatron_mdm.mcore.training.lost_ranks import lost_rank, lost_ranks_in_a_line

TIMEOUT = datetime.timedelta(milliseconds=100)
PLACE = "[/pytorch/third_party/gloo/gloo/transport/tcp/"


@pytest.mark.parametrize(
    "message, reason",
    [
        (
            f"{PLACE}pair.cc:538] Read error [10.0.0.2]:35470: Connection reset by peer",
            "Read error [10.0.0.2]:35470: Connection reset by peer",
        ),
        (
            f"{PLACE}pair.cc:534] Connection closed by peer [10.0.0.2]:35470",
            "Connection closed by peer [10.0.0.2]:35470",
        ),
        (
            f"{PLACE}unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete",
            "Timed out waiting 8000ms for recv operation to complete",
        ),
        (
            "NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network "
            "error, NCCL version 2.27.5\nncclRemoteError: A call failed",
            "remote process exited or there was a network error",
        ),
        # Tensors of two sizes: a fault of the program, not of a rank.
        (f"[enforce fail at {PLACE[1:]}pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4", None),
        ("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)", None),
        # A port that another program uses.
        ("The server socket has failed to listen on any local network address. port: 29500", None),
    ],
)
def test_what_says_that_a_rank_is_gone(message, reason):
    error = RuntimeError(message)
    assert lost_rank(error) == reason
    expected = pytest.raises(LostRankError if reason else RuntimeError)
    with expected as caught, lost_ranks_in_a_line(argparse.Namespace(curr_iteration=4)):
        raise error
    if reason:
        assert str(caught.value).startswith("iteration 5: another rank is gone or does not answer")
        assert f"({reason})" in str(caught.value)
    else:
        assert caught.value is error


def test_the_store_of_the_ranks_is_gone():
    with pytest.raises(torch.distributed.DistNetworkError) as caught:
        torch.distributed.TCPStore("127.0.0.1", 1, is_master=False, timeout=TIMEOUT)
    assert lost_rank(caught.value)
