"""The statistics that the logs show: loss per rate bin, masked fraction, seconds of training.

The rate t dominates the loss of a single step, so everything is accumulated over the log interval.
Recording costs no synchronisation with the device; once per interval it costs two all-reduces, of
3 (2 bins + 6) numbers and of one, over the data-parallel ranks of the last pipeline stage.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from megatron.core import mpu
from megatron.training import get_timers

from megatron_mdm.mcore.data.validation_sets import part_of_set
from megatron_mdm.objective.randomness import Split

Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Finish = Callable[[torch.Tensor], torch.Tensor]


class OverInterval:
    """What the iterations of a log interval come to, on the device.

    Megatron's rerun machine may repeat an iteration to validate its result: that is dropped.

    Args:
        combine: makes one of two values.
    """

    def __init__(self, combine: Combine = torch.add) -> None:
        self.total: torch.Tensor | None = None
        self._combine = combine
        self._pending: torch.Tensor | None = None
        self._iteration: int | None = None

    def add(self, value: torch.Tensor) -> None:
        """Adds what a micro-batch gives; no synchronisation with the device."""
        self._pending = self._with(self._pending, value)

    def commit(self, iteration: int | None, finish: Finish = lambda value: value) -> None:
        """Takes what an iteration has added.

        Args:
            iteration: its number; None where it is no repetition in any case.
            finish: makes of that what is taken.
        """
        is_new = iteration is None or iteration != self._iteration
        if self._pending is not None and is_new:
            self.total = self._with(self.total, finish(self._pending))
        self._iteration, self._pending = iteration, None

    def take(self) -> torch.Tensor:
        """The total, with which it starts over; there is one."""
        total, self.total = self.total, None
        assert total is not None  # the caller looks before
        return total

    def _with(self, before: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
        return value if before is None else self._combine(before, value)


class Recorder:
    """Sums over draws of a rate, on the device; lives on the last pipeline stage.

    A draw is a row, or a document with --mdm-rate-per document. The sums are a matrix with a line
    for each split of the data and these columns: weighted loss per rate bin, importance weight per
    rate bin, weighted loss per eligible token, the numbers of masked and of eligible tokens, of
    draws, of rows, and the sum over draws of the uniform share of their density. Evaluations also
    keep each row's text and loss. Named validation sets have lines of their own, after the others.

    Args:
        num_bins: number of equal bins of the masking rate.
        num_sets: named validation sets.
    """

    def __init__(self, num_bins: int, num_sets: int = 0) -> None:
        self.num_bins = num_bins
        self.sets = [part_of_set(number) for number in range(num_sets)]
        self.parts: list[int] = [*Split, *self.sets]
        self.texts: list[torch.Tensor] = []
        self._sums = OverInterval()
        self._largest = OverInterval(torch.maximum)

    @property
    def total(self) -> torch.Tensor | None:
        """The sums of the iterations since the last `reduce`; None: there was none."""
        return self._sums.total

    def add(
        self,
        split: torch.Tensor,
        t: torch.Tensor,
        rate_weight: torch.Tensor,
        max_token_weight: torch.Tensor,
        loss: torch.Tensor,
        num_masked: torch.Tensor,
        num_eligible: torch.Tensor,
        text: torch.Tensor | None = None,
    ) -> None:
        """Adds b rows; no synchronisation with the device.

        Args:
            split: part of the data, int64 [b]; see `RowDataset`.
            t: masking rates of rows, float64 [b], or documents [b, s], as all that follows.
            rate_weight: importance weights 1/q(t), float64.
            max_token_weight: largest weight of a masked token in each row, 1/q(t) times the mask's,
                float64 [b].
            loss: weighted loss of each draw, nats per eligible token.
            num_masked: masked positions.
            num_eligible: eligible positions; a document without any is no draw, a row is one.
            text: which text each row is of, int64 [b], in evaluations.
        """
        if text is not None:
            self.texts.append(torch.stack([split, text, _as_bits(loss)]))
        in_row = t[0].numel()
        draws = torch.ones_like(num_eligible) if t.dim() == 1 else (num_eligible > 0).long()
        share = torch.full_like(t, 1.0 / in_row)  # of a row: all of them make one
        split = split.repeat_interleave(in_row)
        t, rate_weight, loss = t.flatten(), (rate_weight * draws).flatten(), loss.flatten()
        bins = (t * self.num_bins).long().clamp(max=self.num_bins - 1)
        in_bin = torch.nn.functional.one_hot(bins, self.num_bins).double()
        loss = loss.detach().double()[:, None]
        counts = torch.stack([num_masked, num_eligible, draws, share], dim=-1).view(len(t), 4)
        loss_in_bin = torch.where(in_bin > 0, loss, 0.0)  # a NaN stays in its bin
        columns = [loss_in_bin, in_bin * rate_weight[:, None], loss, counts]
        rows = torch.cat([column.double() for column in columns], dim=1)
        sums = rows.new_zeros(len(self.parts), rows.shape[1]).index_add_(0, split, rows)
        self._sums.add(sums)
        self._largest.add(max_token_weight.max())

    def commit(self, iteration: int | None, uniform_share: float = 1.0) -> None:
        """Takes what an iteration has added; a repetition of the iteration is dropped.

        Args:
            iteration: its number; None: that was an evaluation, which is never repeated.
            uniform_share: of the density that its rates came from; 1 where that is no bell.
        """

        def with_share(sums: torch.Tensor) -> torch.Tensor:
            draws = sums[:, -2:-1]
            return torch.cat([sums, draws * uniform_share], dim=1)

        self._sums.commit(iteration, with_share)
        self._largest.commit(iteration)

    def by_text(self) -> dict[int, tuple[float, int]]:
        """The standard error of the mean loss of rows and the number of texts; a collective call.

        Rows of one text are no independent witnesses: the error is that of the texts' sums. All
        data-parallel ranks have equally many rows. Starts over.

        Returns:
            For each part that has rows, as `reduce`; the error of a single text is NaN.
        """
        own = torch.cat(self.texts, dim=1)
        self.texts = []
        group = mpu.get_data_parallel_group()
        parts = [torch.empty_like(own) for _ in range(group.size())]
        torch.distributed.all_gather(parts, own, group=group)
        splits, texts, bits = torch.cat(parts, dim=1).cpu()
        loss = bits.view(torch.float64).numpy()
        found = {
            part: error_by_text(loss[is_of], texts.numpy()[is_of])
            for part in self.parts
            if (is_of := splits.numpy() == int(part)).any()
        }
        sets = [found[part] for part in self.sets if part in found]
        return {Split.VALID: error_over_sets(sets), **found} if sets else found

    def reduce(self) -> dict[int, "Summary"]:
        """Sums over the data-parallel ranks and starts over; a collective call.

        Context-parallel ranks have the same rows, and so the same sums.

        Returns:
            A summary for each split that has rows, and for each named validation set. That of the
            validation is then over all sets, which have equally many rows.
        """
        total, largest = self._sums.take(), self._largest.take()
        group = mpu.get_data_parallel_group()
        torch.distributed.all_reduce(total, group=group)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
        if self.sets:
            total[Split.VALID] = total[len(Split) :].sum(dim=0)
        lines = zip(self.parts, total.tolist(), strict=True)
        weight = float(largest)
        return {part: Summary(line, self.num_bins, weight) for part, line in lines if line[-2]}


def _as_bits(values: torch.Tensor) -> torch.Tensor:
    """Numbers as int64, which travel beside others without a loss."""
    return values.detach().double().view(torch.int64)


def error_by_text(loss: np.ndarray, text: np.ndarray) -> tuple[float, int]:
    """The standard error of the mean of rows that are drawn from texts, some from the same.

    As of a ratio of sums over texts, each text a cluster of rows.

    Args:
        loss: of each row [n].
        text: which one it is of, integers [n].

    Returns:
        The error, NaN for one text, and the number of texts.
    """
    _, of, counts = np.unique(text, return_inverse=True, return_counts=True)
    residuals = np.bincount(of, weights=loss) - counts * loss.mean()
    texts = len(counts)
    if texts == 1:
        return math.nan, texts
    return math.sqrt((residuals**2).sum() * texts / (texts - 1)) / len(loss), texts


def error_over_sets(sets: list[tuple[float, int]]) -> tuple[float, int]:
    """The standard error of the mean over sets of equally many rows, and the number of texts.

    The sets are fixed: the differences between them are no noise.

    Args:
        sets: of each, see `error_by_text`.
    """
    error = math.sqrt(sum(error**2 for error, _ in sets)) / len(sets)
    return error, sum(texts for _, texts in sets)


class Summary:
    """Means over the draws of one split: its rows, or documents with --mdm-rate-per document.

    Attributes:
        loss_per_bin: mean loss of those in each rate bin, nats per token, NaN if there is none.
        loss: mean loss, an estimate of the NELBO, nats per token.
        loss_sums, weight_sums: sums over those in each rate bin of weighted loss and of 1/q(t).
        masked_fraction: masked / eligible tokens.
        draws, rows: their numbers.
        largest_weight: of a masked token's loss, over the rows of all splits.
        uniform_share: mean over the draws, 1 where the density is no bell.
    """

    def __init__(self, line: list[float], num_bins: int, largest_weight: float) -> None:
        self.largest_weight = largest_weight
        self.loss_sums = np.array(line[:num_bins])
        self.weight_sums = np.array(line[num_bins : 2 * num_bins])
        sums = zip(self.loss_sums.tolist(), self.weight_sums.tolist(), strict=True)
        self.loss_per_bin = [x / w if w else math.nan for x, w in sums]
        loss, masked, eligible, draws, rows, shares = line[2 * num_bins :]
        self.draws, self.rows = int(draws), round(rows)
        self.loss = loss / draws if draws else math.nan
        self.uniform_share = shares / draws if draws else 1.0
        self.masked_fraction = masked / eligible if eligible else 0.0

    def text(self) -> str:
        """`0.05: 3.1416` and so on: the middle of each bin of t and its loss."""
        n = len(self.loss_per_bin)
        return " ".join(f"{(i + 0.5) / n:.2f}: {x:.4f}" for i, x in enumerate(self.loss_per_bin))


class TrainingClock:
    """Seconds of training, without evaluations and checkpoints.

    By Megatron's own timer, which stands still during these.
    """

    def __init__(self) -> None:
        self._last = 0.0

    def lap(self) -> float:
        """Seconds since the last call, or since the start."""
        timer = get_timers()("interval-time")
        timer.elapsed(reset=False)  # brings the active time up to date
        before, self._last = self._last, timer.active_time()
        return self._last - before
