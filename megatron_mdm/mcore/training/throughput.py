"""Useful floating-point operations of training, for --log-throughput.

Megatron's own figure takes half of the attention for causal, and the head for one at all positions.
Here rows say what was of use: positions, pairs of positions of which one attends to the other, and
masked positions. `ModelShape` says what each of them costs.
"""

import torch
from megatron.core import mpu

from megatron_mdm.mcore.training.metrics import OverInterval
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
        self._sums = OverInterval()

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
        self._sums.add(torch.stack([useful.sum(), pairs, masked]))

    def commit(self, iteration: int) -> None:
        """Takes what an iteration has added; a repetition of the iteration is dropped.

        Args:
            iteration: its number.
        """
        self._sums.commit(iteration)

    def reduce(self) -> float:
        """Operations of all ranks since the last call; a collective call."""
        total = self._sums.take()
        torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group())
        return self._shape.training_flops_of(*total.tolist())
