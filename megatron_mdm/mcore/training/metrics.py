"""The statistics that the logs show: loss per rate bin, masked fraction, seconds of training.

The rate t dominates the loss of a single step, so all statistics are accumulated over a log
interval. Recording needs no synchronisation with the device. Once per interval it needs two
all-reduces over the data-parallel ranks of the last pipeline stage: 3 (3 bins + 6) numbers, and one
number.
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
    """A total over the iterations of a log interval, on the device.

    Megatron's rerun machine may repeat an iteration to validate its result. Repetitions are not
    added.

    Args:
        combine: combines two values into one.
    """

    def __init__(self, combine: Combine = torch.add) -> None:
        self.total: torch.Tensor | None = None
        self._combine = combine
        self._pending: torch.Tensor | None = None
        self._iteration: int | None = None

    def add(self, value: torch.Tensor) -> None:
        """Adds the value of a micro-batch; no synchronisation with the device."""
        self._pending = self._with(self._pending, value)

    def commit(self, iteration: int | None, finish: Finish = lambda value: value) -> None:
        """Adds an iteration's value, the combination of its micro-batches, to the total.

        Args:
            iteration: number of the iteration; None: it cannot be a repetition.
            finish: transforms the iteration's value before it is added.
        """
        is_new = iteration is None or iteration != self._iteration
        if self._pending is not None and is_new:
            self.total = self._with(self.total, finish(self._pending))
        self._iteration, self._pending = iteration, None

    def take(self) -> torch.Tensor:
        """Returns the total, which must exist, and resets it."""
        total, self.total = self.total, None
        assert total is not None  # the caller checks `total` first
        return total

    def _with(self, before: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
        return value if before is None else self._combine(before, value)


class Recorder:
    """Sums over draws of a rate, on the device; lives on the last pipeline stage.

    A draw is a row, document or block, whichever has a rate of its own. In training all draws count
    alike. In evaluations all rows do, and a block counts by its share of its row's eligible tokens,
    so that the mean has the same meaning for all block sizes. The sums are a matrix. Its rows are
    the splits of the data, followed by the other parts. Its columns are: weighted loss
    per rate bin, importance weight of the rate per rate bin, importance weight that the loss has
    per rate bin, weighted loss per eligible token, number of masked tokens, of eligible tokens, of
    draws and of rows, and the sum over draws of the uniform share of their density. Evaluations
    also keep the text number and loss of each row.

    Args:
        num_bins: number of equal bins of the masking rate.
        num_parts: number of further parts of the data: named validation sets, each at each of the
            block sizes of evaluations, and test sets.
        has_mean: whether all of them are validation sets, whose mean is the validation loss.
    """

    def __init__(self, num_bins: int, num_parts: int = 0, has_mean: bool = False) -> None:
        self.num_bins = num_bins
        others = [part_of_set(number) for number in range(num_parts)]
        self.sets = others if has_mean else []
        self.parts: list[int] = [*Split, *others]
        self.texts: list[torch.Tensor] = []
        self._sums = OverInterval()
        self._largest = OverInterval(torch.maximum)

    @property
    def total(self) -> torch.Tensor | None:
        """The sums of the iterations since the last `reduce`; None: no iteration was added."""
        return self._sums.total

    def add(
        self,
        split: torch.Tensor,
        t: torch.Tensor,
        rate_weight: torch.Tensor,
        draw_weight: torch.Tensor,
        max_token_weight: torch.Tensor,
        loss: torch.Tensor,
        num_masked: torch.Tensor,
        num_eligible: torch.Tensor,
        text: torch.Tensor | None = None,
    ) -> None:
        """Adds b rows; no synchronisation with the device.

        Args:
            split: part of the data, int64 [b]; see `RowDataset`.
            t: masking rates of rows, float64 [b], or of documents or blocks, [b, s]. The arguments
                from `rate_weight` to `num_eligible` have the same shape, except `max_token_weight`.
            rate_weight: importance weights 1/q(t), float64.
            draw_weight: the importance weights that `loss` has; see `Corruption`.
            max_token_weight: largest weight of a masked token in each row, 1/q(t) times the mask's,
                float64 [b].
            loss: weighted loss of each draw, nats per eligible token.
            num_masked: number of masked positions.
            num_eligible: number of eligible positions. A document or block without any is not a
                draw; a row without any is one.
            text: number of the text that each row comes from, int64 [b], in evaluations.
        """
        in_row = t[0].numel()
        draws = torch.ones_like(num_eligible) if t.dim() == 1 else (num_eligible > 0).long()
        share = torch.full_like(t, 1.0 / in_row)  # sums to 1 over a row, so it counts rows
        if text is not None:
            if t.dim() == 2:
                size = num_eligible.double()
                whole = size.sum(dim=1, keepdim=True)
                draws = share = torch.where(whole > 0, size / whole, share)
                loss = loss * share
            of_row = loss if t.dim() == 1 else loss.sum(dim=1)
            self.texts.append(torch.stack([split, text, _as_bits(of_row)]))
        split = split.repeat_interleave(in_row)
        t, loss = t.flatten(), loss.flatten()
        weights = [(x * draws).flatten()[:, None] for x in (rate_weight, draw_weight)]
        bins = (t * self.num_bins).long().clamp(max=self.num_bins - 1)
        in_bin = torch.nn.functional.one_hot(bins, self.num_bins).double()
        loss = loss.detach().double()[:, None]
        counts = torch.stack([num_masked, num_eligible, draws, share], dim=-1).view(len(t), 4)
        loss_in_bin = torch.where(in_bin > 0, loss, 0.0)  # a NaN stays in its bin
        columns = [loss_in_bin, *(in_bin * weight for weight in weights), loss, counts]
        rows = torch.cat([column.double() for column in columns], dim=1)
        sums = rows.new_zeros(len(self.parts), rows.shape[1]).index_add_(0, split, rows)
        self._sums.add(sums)
        self._largest.add(max_token_weight.max())

    def commit(self, iteration: int | None, uniform_share: float = 1.0) -> None:
        """Adds an iteration to the sums; a repetition of the iteration is dropped.

        Args:
            iteration: number of the iteration; None: an evaluation, which is never repeated.
            uniform_share: uniform share of the density of its rates; 1 if that is no bell.
        """

        def with_share(sums: torch.Tensor) -> torch.Tensor:
            draws = sums[:, -2:-1]
            return torch.cat([sums, draws * uniform_share], dim=1)

        self._sums.commit(iteration, with_share)
        self._largest.commit(iteration)

    def by_text(self) -> dict[int, tuple[float, int]]:
        """The standard error of the mean loss of rows, and the number of texts; a collective call.

        Rows of the same text are not independent, so the error is computed from sums per text. All
        data-parallel ranks must have equally many rows. The call clears the kept rows.

        Returns:
            (standard error, number of texts) for each part that has rows, with the keys of
            `reduce`; the error of a single text is NaN.
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
        """Sums over the data-parallel ranks and resets the sums; a collective call.

        Context-parallel ranks have the same rows, and so the same sums.

        Returns:
            A summary for each split that has rows, and for each named validation set. With named
            sets, the summary of the validation split is over all sets, which have equally many
            rows.
        """
        total, largest = self._sums.take(), self._largest.take()
        group = mpu.get_data_parallel_group()
        torch.distributed.all_reduce(total, group=group)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
        if self.sets:
            total[Split.VALID] = total[self.sets].sum(dim=0)
        lines = zip(self.parts, total.tolist(), strict=True)
        weight = float(largest)
        return {part: Summary(line, self.num_bins, weight) for part, line in lines if line[-2]}


def _as_bits(values: torch.Tensor) -> torch.Tensor:
    """The bits of float64 values as int64, so that one integer tensor can hold them exactly."""
    return values.detach().double().view(torch.int64)


def error_by_text(loss: np.ndarray, text: np.ndarray) -> tuple[float, int]:
    """The standard error of the mean loss of rows, some of which come from the same text.

    The mean is a ratio of sums over texts, and each text is a cluster of rows. The error is the
    cluster-robust standard error of that ratio.

    Args:
        loss: loss of each row [n].
        text: number of the text that each row comes from, integers [n].

    Returns:
        The error (NaN for one text) and the number of texts.
    """
    _, of, counts = np.unique(text, return_inverse=True, return_counts=True)
    residuals = np.bincount(of, weights=loss) - counts * loss.mean()
    texts = len(counts)
    if texts == 1:
        return math.nan, texts
    return math.sqrt((residuals**2).sum() * texts / (texts - 1)) / len(loss), texts


def error_over_sets(sets: list[tuple[float, int]]) -> tuple[float, int]:
    """The standard error of the mean over sets of equally many rows, and the number of texts.

    The sets are fixed, so differences between them do not count as noise.

    Args:
        sets: error and number of texts of each set; see `error_by_text`.
    """
    error = math.sqrt(sum(error**2 for error, _ in sets)) / len(sets)
    return error, sum(texts for _, texts in sets)


class Summary:
    """Means over the draws of one split; see `Recorder`.

    Attributes:
        loss_per_bin: mean loss of the draws in each rate bin, nats per token; NaN for empty bins.
            It is the sum of weighted losses over the sum of the weights that they have.
        loss: mean loss, an estimate of the NELBO, nats per token.
        loss_sums, weight_sums: sums of weighted loss and of 1/q(t) over the draws in each rate bin.
            A loss may have another weight than 1/q(t), that of its count, but only the mean of
            1/q(t) in a bin is known exactly, which the control variate needs.
        masked_fraction: masked / eligible tokens.
        draws, rows: number of draws (in evaluations that of rows) and of rows.
        largest_weight: largest weight of a masked token's loss, over the rows of all splits.
        uniform_share: mean uniform share of the density over the draws; 1 if it is no bell.
    """

    def __init__(self, line: list[float], num_bins: int, largest_weight: float) -> None:
        self.largest_weight = largest_weight
        bins = np.array(line[: 3 * num_bins]).reshape(3, num_bins)
        self.loss_sums, self.weight_sums, of_loss = bins
        sums = zip(self.loss_sums.tolist(), of_loss.tolist(), strict=True)
        self.loss_per_bin = [x / w if w else math.nan for x, w in sums]
        loss, masked, eligible, draws, rows, shares = line[3 * num_bins :]
        self.draws, self.rows = round(draws), round(rows)
        self.loss = loss / draws if draws else math.nan
        self.uniform_share = shares / draws if draws else 1.0
        self.masked_fraction = masked / eligible if eligible else 0.0

    def text(self) -> str:
        """The middle of each bin of t and its loss, as `0.05: 3.1416 0.15: ...`."""
        n = len(self.loss_per_bin)
        return " ".join(f"{(i + 0.5) / n:.2f}: {x:.4f}" for i, x in enumerate(self.loss_per_bin))


class TrainingClock:
    """Seconds of training, without evaluations and checkpoints.

    It reads Megatron's own timer, which is stopped during evaluations and checkpoints.
    """

    def __init__(self) -> None:
        self._last = 0.0

    def lap(self) -> float:
        """Seconds since the last call, or since the start."""
        timer = get_timers()("interval-time")
        timer.elapsed(reset=False)  # brings the active time up to date
        before, self._last = self._last, timer.active_time()
        return self._last - before
