"""Useful floating-point operations of training, for --log-throughput.

Megatron's own figure takes half of the attention for causal, and the head for one at all positions.
Here rows say what was of use: positions, pairs of positions of which one attends to the other, and
masked positions. `ModelShape` says what each of them costs.
"""

import torch
from megatron.core import mpu

from megatron_mdm.mcore.training.micro_batch import MicroBatch
from megatron_mdm.objective.segments import counts
from megatron_mdm.sizing.flops import ModelShape


class WorkRecorder:
    """Counts over a log interval, on the device; lives on the last pipeline stage.

    Args:
        shape: of the model.
    """

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        self._pending: torch.Tensor | None = None
        self._total: torch.Tensor | None = None
        self._iteration = -1

    def add(self, micro_batch: MicroBatch) -> None:
        """Adds a micro-batch of training; no synchronisation with the device.

        Padding and what follows the end of a row are of no use, unless they are predicted. Where
        attention opens step by step (--mdm-anneal-attention-iters), all of it is counted.
        """
        batch = micro_batch.batch
        useful = ~batch.past_end
        if not batch.mdm.pad_eligible:
            useful = useful & ~batch.padding
        pairs = counts(useful, batch.attention_segments).square().sum()
        masked = micro_batch.num_masked.sum()
        found = torch.stack([useful.sum(), pairs, masked])
        self._pending = found if self._pending is None else self._pending + found

    def commit(self, iteration: int) -> None:
        """Takes what an iteration has added; a repetition of the iteration is dropped.

        Args:
            iteration: its number.
        """
        if self._pending is not None and iteration != self._iteration:
            self._total = self._pending if self._total is None else self._total + self._pending
        self._iteration, self._pending = iteration, None

    def reduce(self) -> float:
        """Operations of all ranks since the last call; a collective call."""
        total, self._total = self._total, None
        assert total is not None  # an iteration has come before
        torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group())
        return self._shape.training_flops_of(*total.tolist())
