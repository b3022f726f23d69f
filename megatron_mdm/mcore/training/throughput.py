"""Useful floating-point operations of training, for --log-throughput.

Megatron's own count assumes causal attention, which costs half, and a head at all positions. This
one counts useful positions, pairs of positions where one attends to the other, and masked
positions. `ModelShape` gives the cost of each.
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
        shape: shape of the model.
    """

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        self._sums = OverInterval()

    def add(self, micro_batch: MicroBatch) -> None:
        """Adds a micro-batch of training; no synchronisation with the device.

        Padding is not useful unless it is predicted (pad_eligible). Positions after the end of a
        row are never useful. While attention is annealed (--mdm-anneal-attention-iters), all pairs
        count as in full attention. Rows with blocks count with all copies of their tokens.
        """
        batch = micro_batch.batch
        useful = ~batch.past_end
        if not batch.mdm.pad_eligible:
            useful = useful & ~batch.padding
        rows, mask = batch.block_rows, micro_batch.corruption.mask
        if rows is None:
            pairs = counts(useful, batch.attention_segments).square().sum()
            work = [useful.sum(), pairs, mask.sum()]
        else:
            useful = useful[:: rows.views]
            predicting = rows.predicting(mask, batch.next_tokens).sum()
            work = [useful.sum() * rows.copies, rows.attended_pairs(useful), predicting]
        self._sums.add(torch.stack(work))

    def commit(self, iteration: int) -> None:
        """Adds an iteration to the counts; a repetition of the iteration is dropped.

        Args:
            iteration: number of the iteration.
        """
        self._sums.commit(iteration)

    def reduce(self) -> float:
        """Floating-point operations of all ranks since the last call; a collective call."""
        total = self._sums.take()
        torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group())
        return self._shape.training_flops_of(*total.tolist())
