"""The default entry of `launch`: the program, with a record of the rows that each rank saw."""

import os

import torch

from megatron_mdm.mcore.device import replaced
from megatron_mdm.mcore.training import forward_step as step
from megatron_mdm.mcore.training.state import TrainingState
from megatron_mdm.pretrain import main


def train() -> None:
    """Runs the program as a user starts it, and records (split, row) -> (t, masked tokens)."""
    trace: dict = {}
    load_batch, corrupter = step.load_batch, TrainingState.corrupter
    seen: dict = {}

    def recording_load_batch(*args):
        seen["rows"] = load_batch(*args)
        return seen["rows"]

    def recording_corrupter(state, training):
        def corrupt(*args):
            corruption = corrupter(state, training)(*args)
            rows = seen["rows"]
            keys = zip(rows.split.tolist(), rows.row.tolist(), strict=True)
            values = zip(corruption.t.tolist(), corruption.tokens.tolist(), strict=True)
            for key, value in zip(keys, values, strict=True):
                # Only evaluations see a row again, and blocks of another size have other masks.
                assert trace.setdefault((*key, rows.block_size), value) == value
            return corruption

        return corrupt

    try:
        with (
            replaced(step, "load_batch", recording_load_batch),
            replaced(TrainingState, "corrupter", recording_corrupter),
        ):
            main()
    finally:
        torch.save(
            {key[:2]: value for key, value in trace.items()},
            f"{os.environ['TRACE_DIR']}/trace{os.environ['RANK']}.pt",
        )
