"""What the logs say beside Megatron's own line: loss per rate bin, masked fraction, throughput.

The rate t dominates the loss of a single step, so everything is accumulated over the log interval.
Recording costs no synchronisation with the device; once per interval it costs one all-reduce of
2 bins + 3 numbers over the data-parallel ranks of the last pipeline stage.
"""

import math
import time
from functools import lru_cache
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.distributed import finalize_model_grads
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer
from megatron.training.utils import is_last_rank


class Recorder:
    """Sums over the rows of an interval, on the device; lives on the last pipeline stage.

    Args:
        num_bins: number of equal bins of the masking rate.
    """

    def __init__(self, num_bins: int) -> None:
        self.num_bins = num_bins
        self.pending: torch.Tensor | None = None
        self.total: torch.Tensor | None = None
        self.iteration = -1

    def add(
        self,
        t: torch.Tensor,
        loss: torch.Tensor,
        num_masked: torch.Tensor,
        num_eligible: torch.Tensor,
    ) -> None:
        """Adds b rows.

        Args:
            t: masking rates, float64 [b].
            loss: loss of each row, nats per eligible token [b].
            num_masked: masked positions [b].
            num_eligible: eligible positions [b].
        """
        bins = (t * self.num_bins).long().clamp(max=self.num_bins - 1)
        sums = torch.zeros(2 * self.num_bins + 3, dtype=torch.float64, device=t.device)
        sums.index_add_(0, bins, loss.detach().double())
        sums.index_add_(0, self.num_bins + bins, torch.ones_like(t))
        sums[-3] = num_masked.sum()
        sums[-2] = num_eligible.sum()
        sums[-1] = len(t)
        self.pending = sums if self.pending is None else self.pending + sums

    def commit(self, iteration: int) -> None:
        """Takes what an iteration has added; a repetition of the iteration is dropped.

        Megatron's rerun machine may repeat an iteration to validate its result.
        """
        if self.pending is not None and iteration != self.iteration:
            self.total = self.pending if self.total is None else self.total + self.pending
        self.iteration = iteration
        self.pending = None

    def reduce(self) -> "Summary":
        """Sums over the data-parallel ranks and starts over; a collective call."""
        total, self.total = self.total, None
        group = mpu.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(total, group=group)
        return Summary(total.tolist(), self.num_bins)


class Summary:
    """Means over an interval.

    Attributes:
        loss_per_bin: mean loss of the rows in each rate bin, nats per token, NaN if there is none.
        masked_fraction: masked / eligible tokens.
        rows: number of rows.
    """

    def __init__(self, sums: list[float], num_bins: int) -> None:
        losses, counts = sums[:num_bins], sums[num_bins : 2 * num_bins]
        self.loss_per_bin = [a / n if n else math.nan for a, n in zip(losses, counts, strict=True)]
        self.masked_fraction = sums[-3] / sums[-2] if sums[-2] else 0.0
        self.rows = int(sums[-1])

    def text(self) -> str:
        """`0.05: 3.1416` and so on: the middle of each bin of t and its loss."""
        n = len(self.loss_per_bin)
        return " ".join(f"{(i + 0.5) / n:.2f}: {x:.4f}" for i, x in enumerate(self.loss_per_bin))


@lru_cache
def recorder(training: bool) -> Recorder:
    """The recorder of training, or of evaluations, of this process."""
    return Recorder(get_args().mdm_rate_bins)


def finalize_and_log(model: list, num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Megatron's `finalize_model_grads` once per step, and our log line at every log interval."""
    finalize_model_grads(model, num_tokens, **kwargs)
    if not mpu.is_pipeline_last_stage(ignore_virtual=True):
        return
    args = get_args()
    iteration = args.curr_iteration + 1
    recorder(True).commit(iteration)
    if iteration % args.log_interval == 0:
        summary = recorder(True).reduce()
        seconds = _seconds_since_last_call()
        if is_last_rank():
            _log_training(summary, iteration, seconds)


def evaluation_hook(model: list) -> None:
    """Megatron's `non_loss_data_func`: called on all ranks at the end of every evaluation."""
    if not mpu.is_pipeline_last_stage(ignore_virtual=True):
        return
    iteration = get_args().curr_iteration
    # Evaluations never repeat, and their iteration may equal the last one's.
    recorder(False).iteration = -1
    recorder(False).commit(iteration)
    summary = recorder(False).reduce()
    if is_last_rank():
        print(f" validation loss per rate (t: nats/token) | {summary.text()}", flush=True)
        _write({f"mdm/validation {k}": v for k, v in _bins(summary).items()}, iteration)


@lru_cache
def _clock() -> dict[str, float]:
    return {}


def _seconds_since_last_call() -> float:
    """Seconds since the last log line; NaN at the first, which would include the start-up."""
    now = time.perf_counter()
    before = _clock().get("last", math.nan)
    _clock()["last"] = now
    return now - before


def _log_training(summary: Summary, iteration: int, seconds: float) -> None:
    rows_per_s = summary.rows / seconds
    tokens_per_s = rows_per_s * get_args().seq_length
    speed = (
        "" if math.isnan(seconds) else f" rows/s: {rows_per_s:.2f} | tokens/s: {tokens_per_s:.1f} |"
    )
    print(
        f" mdm iteration {iteration:8d} | masked fraction: {summary.masked_fraction:.4f} |{speed}"
        f" loss per rate (t: nats/token) | {summary.text()}",
        flush=True,
    )
    scalars = {"mdm/masked fraction": summary.masked_fraction}
    if speed:
        scalars |= {"mdm/rows per s": rows_per_s, "mdm/tokens per s": tokens_per_s}
    _write(scalars | {f"mdm/{k}": v for k, v in _bins(summary).items()}, iteration)


def _bins(summary: Summary) -> dict[str, float]:
    n = len(summary.loss_per_bin)
    return {
        f"loss at t {i / n:.2f}-{(i + 1) / n:.2f}": x
        for i, x in enumerate(summary.loss_per_bin)
        if not math.isnan(x)
    }


def _write(scalars: dict[str, float], iteration: int) -> None:
    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    if writer:
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if wandb:
        wandb.log(scalars, iteration)
