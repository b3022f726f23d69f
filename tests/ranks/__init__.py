"""Real ranks for tests: the program itself, over gloo, in processes forked from a warm server.

A fork server imports torch and Megatron once (6 s). Every rank of every run is a fork of this
server with fresh Megatron globals, as if torchrun had started it. The server has no Transformer
Engine; ranks that need it are started as new processes. `launch_all` gives several runs to one
group of ranks.

`launch` calls an entry function on every rank. The default entry is `train`, the program with a
record of its rows. Other entries stand beside the test that launches them, or in entries.py if
several test files use them.
"""

from tests.ranks.datasets import random_documents, random_pairs, write_documents, write_pairs
from tests.ranks.flags import EOD_ID, MASK_ID, MODEL, TOKENIZER, TRAINING, VOCAB
from tests.ranks.launcher import (
    Run,
    assert_masks_equal_after_refits,
    launch,
    launch_all,
    launch_layouts,
    meet_again,
    read_scalars,
    the_error_line,
    weights,
)
from tests.ranks.recording import train
from tests.ranks.tools import TORCHRUN, fit_ppots, run_forked, run_tool, users_environment

__all__ = [
    "EOD_ID",
    "MASK_ID",
    "MODEL",
    "TOKENIZER",
    "TORCHRUN",
    "TRAINING",
    "VOCAB",
    "Run",
    "assert_masks_equal_after_refits",
    "fit_ppots",
    "launch",
    "launch_all",
    "launch_layouts",
    "meet_again",
    "random_documents",
    "random_pairs",
    "read_scalars",
    "run_forked",
    "run_tool",
    "the_error_line",
    "train",
    "users_environment",
    "weights",
    "write_documents",
    "write_pairs",
]
