"""What the logs say beside Megatron's own line: loss per rate bin, masked fraction, throughput.

The rate t dominates the loss of a single step, so everything is accumulated over the log interval.
Recording costs no synchronisation with the device; once per interval it costs two all-reduces, of
3 (2 bins + 5) numbers and of one, over the data-parallel ranks of the last pipeline stage.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core import mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.training import get_args, get_tensorboard_writer, get_timers, get_wandb_writer
from megatron.training.utils import is_last_rank

from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.checkpoint.carried_state import CarriedState
from megatron_mdm.mcore.training.online_sampler import online_sampler
from megatron_mdm.objective.control_variate import ControlVariate
from megatron_mdm.objective.ppots.fit import PpotsFit
from megatron_mdm.objective.randomness import Split


class Recorder:
    """Sums over draws of a rate, on the device; lives on the last pipeline stage.

    A draw is a row, or a document with --mdm-rate-per document. The sums are a matrix with a line
    for each split of the data and these columns: weighted loss per rate bin, importance weight per
    rate bin, weighted loss per eligible token, the numbers of masked and of eligible tokens, of
    draws, and of rows. Evaluations also keep each row's text and loss.

    Args:
        num_bins: number of equal bins of the masking rate.
    """

    def __init__(self, num_bins: int) -> None:
        self.num_bins = num_bins
        self.pending: torch.Tensor | None = None
        self.total: torch.Tensor | None = None
        self.texts: list[torch.Tensor] = []
        self.pending_largest: torch.Tensor | None = None
        self.largest: torch.Tensor | None = None
        self.iteration = -1

    def add(
        self,
        split: torch.Tensor,
        t: torch.Tensor,
        rate_weight: torch.Tensor,
        weight: torch.Tensor,
        loss: torch.Tensor,
        num_masked: torch.Tensor,
        num_eligible: torch.Tensor,
        text: torch.Tensor | None = None,
    ) -> None:
        """Adds b rows; no synchronisation with the device.

        Args:
            split: part of the data, int64 [b].
            t: masking rates of rows, float64 [b], or documents [b, s], as all that follows.
            rate_weight: importance weights 1/q(t), float64.
            weight: largest weight of a masked token in each row, 1/q(t) times the mask's, float64
                [b].
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
        sums = rows.new_zeros(len(Split), rows.shape[1]).index_add_(0, split, rows)
        self.pending = sums if self.pending is None else self.pending + sums
        self.pending_largest = _larger(self.pending_largest, weight.max())

    def commit(self, iteration: int) -> None:
        """Takes what an iteration has added; a repetition of the iteration is dropped.

        Megatron's rerun machine may repeat an iteration to validate its result.
        """
        if self.pending is not None and iteration != self.iteration:
            self.total = self.pending if self.total is None else self.total + self.pending
            self.largest = _larger(self.largest, self.pending_largest)
        self.iteration = iteration
        self.pending = self.pending_largest = None

    def by_text(self) -> dict[Split, tuple[float, int]]:
        """The standard error of the mean loss of rows and the number of texts; a collective call.

        Rows of one text are no independent witnesses: the error is that of the texts' sums. All
        data-parallel ranks have equally many rows. Starts over.

        Returns:
            For each split that has rows; the error of a single text is NaN.
        """
        own = torch.cat(self.texts, dim=1)
        self.texts = []
        group = mpu.get_data_parallel_group()
        parts = [torch.empty_like(own) for _ in range(group.size())]
        torch.distributed.all_gather(parts, own, group=group)
        splits, texts, bits = torch.cat(parts, dim=1).cpu()
        loss = bits.view(torch.float64).numpy()
        return {
            split: error_by_text(loss[is_of], texts.numpy()[is_of])
            for split in Split
            if (is_of := splits.numpy() == int(split)).any()
        }

    def reduce(self) -> dict[Split, "Summary"]:
        """Sums over the data-parallel ranks and starts over; a collective call.

        Context-parallel ranks have the same rows, and so the same sums.

        Returns:
            A summary for each split that has rows.
        """
        total, largest = self.total, self.largest
        self.total = self.largest = None
        group = mpu.get_data_parallel_group()
        torch.distributed.all_reduce(total, group=group)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
        lines = zip(Split, total.tolist(), strict=True)
        weight = float(largest)
        return {split: Summary(line, self.num_bins, weight) for split, line in lines if line[-1]}


def _larger(a: torch.Tensor | None, b: torch.Tensor) -> torch.Tensor:
    return b if a is None else torch.maximum(a, b)


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


class Summary:
    """Means over the draws of one split: its rows, or documents with --mdm-rate-per document.

    Attributes:
        loss_per_bin: mean loss of those in each rate bin, nats per token, NaN if there is none.
        loss: mean loss, an estimate of the NELBO, nats per token.
        loss_sums, weight_sums: sums over those in each rate bin of weighted loss and of 1/q(t).
        masked_fraction: masked / eligible tokens.
        draws, rows: their numbers.
        largest_weight: of a masked token's loss, over the rows of all splits.
    """

    def __init__(self, line: list[float], num_bins: int, largest_weight: float) -> None:
        self.largest_weight = largest_weight
        self.loss_sums = np.array(line[:num_bins])
        self.weight_sums = np.array(line[num_bins : 2 * num_bins])
        sums = zip(self.loss_sums.tolist(), self.weight_sums.tolist(), strict=True)
        self.loss_per_bin = [x / w if w else math.nan for x, w in sums]
        loss, masked, eligible, draws, rows = line[2 * num_bins :]
        self.draws, self.rows = int(draws), round(rows)
        self.loss = loss / draws if draws else math.nan
        self.masked_fraction = masked / eligible if eligible else 0.0

    def text(self) -> str:
        """`0.05: 3.1416` and so on: the middle of each bin of t and its loss."""
        n = len(self.loss_per_bin)
        return " ".join(f"{(i + 0.5) / n:.2f}: {x:.4f}" for i, x in enumerate(self.loss_per_bin))


@lru_cache
def recorder(training: bool) -> Recorder:
    """The recorder of training, or of evaluations, of this process."""
    return Recorder(get_args().mdm_rate_bins)


@lru_cache
def control_variate() -> ControlVariate:
    """The control variate of the reported training loss of this process."""
    mdm = MDMConfig.from_args(get_args())
    return ControlVariate(mdm.rate_bins, mdm.ema_decay, *(mdm.clip or (0.0, 1.0)))


class LogState(CarriedState):
    """Carries the control variate of the last rank, which logs, through checkpoints.

    The sums of a log interval that has only begun are not kept: its line, after a resume, is of the
    rows since then.
    """

    KEY = "mdm_log_state"

    def vector(self) -> npt.NDArray[np.int64]:
        """The average loss of each rate bin; NaN where there is none yet."""
        control = control_variate()
        baseline = np.full(len(control.mass), np.nan)
        if control.baseline is not None:
            baseline = control.baseline.copy()
        return baseline.view(np.int64)

    def gather(self) -> None:
        """Tells all ranks the average of the last one."""
        last = torch.distributed.get_world_size() - 1
        bits = torch.from_numpy(self.vector()).to(torch.cuda.current_device())
        torch.distributed.broadcast(bits, src=last)
        self.restore(bits.cpu().numpy())

    def restore(self, vector: npt.NDArray[np.int64]) -> None:
        """Goes on from a checkpoint."""
        baseline = vector.view(np.float64).copy()
        control_variate().baseline = None if np.isnan(baseline).any() else baseline


def finalize_and_log(model: list, num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Megatron's `finalize_model_grads` once per step, and our log line at every log interval."""
    finalize_model_grads(model, num_tokens, **kwargs)
    online = online_sampler()
    refit = online.step(get_args().curr_iteration + 1) if online is not None else None
    if refit is not None and is_last_rank():
        if isinstance(refit, PpotsFit):
            _log_refit(refit, get_args().curr_iteration + 1)
        else:
            print(
                f" mdm P-POTS keeps its density at iteration {get_args().curr_iteration + 1} | "
                f"{online.state.moments.skipped} rows skipped | {refit} "
                "(--mdm-ppots-refit-interval, --mdm-ppots-bins)",
                flush=True,
            )
    if not mpu.is_pipeline_last_stage(ignore_virtual=True):
        return
    args = get_args()
    iteration = args.curr_iteration + 1
    recorder(True).commit(iteration)
    # Nothing is there when Megatron's rerun machine repeats an iteration that was logged already.
    if iteration % args.log_interval == 0 and recorder(True).total is not None:
        summary = recorder(True).reduce()[Split.TRAIN]
        seconds = _training_seconds()
        if is_last_rank():
            _log_training(summary, iteration, seconds)


def evaluation_hook(model: list) -> None:
    """Megatron's `non_loss_data_func`: called on all ranks at the end of every evaluation."""
    if not mpu.is_pipeline_last_stage(ignore_virtual=True):
        return
    # Megatron counts the step that was just finished from 0; with --skip-train there is none, only
    # the iteration that was loaded.
    args = get_args()
    # A finished run that is started again does not train either.
    trains = not args.skip_train and args.iteration < (args.train_iters or 0)
    iteration = args.curr_iteration + 1 if trains else args.iteration
    # Evaluations never repeat, and their iteration may equal the last one's.
    recorder(False).iteration = -1
    recorder(False).commit(iteration)
    by_text = recorder(False).by_text()
    for split, summary in recorder(False).reduce().items():
        name = {Split.VALID: "validation", Split.TEST: "test"}[split]
        stderr, texts = by_text[split]
        if is_last_rank():
            of = f"{summary.rows} rows"
            of += f" of {texts} texts" if texts < summary.rows else ""
            print(
                f" {name} NELBO: {summary.loss:.4f} +- {stderr:.4f} nats/token (mean over {of}) | "
                f"per rate (t: nats/token) | {summary.text()}",
                flush=True,
            )
            scalars = {"NELBO": summary.loss, "NELBO stderr": stderr, **_bins(summary)}
            _write({f"mdm/{name} {key}": value for key, value in scalars.items()}, iteration)


@lru_cache
def _clock() -> dict[str, float]:
    return {"last": 0.0}


def _training_seconds() -> float:
    """Seconds of training since the last call, without evaluations and checkpoints.

    By Megatron's own timer, which stands still during these.
    """
    timer = get_timers()("interval-time")
    timer.elapsed(reset=False)  # brings the active time up to date
    before, _clock()["last"] = _clock()["last"], timer.active_time()
    return timer.active_time() - before


def _log_training(summary: Summary, iteration: int, seconds: float) -> None:
    args = get_args()
    rows_per_s = summary.rows / seconds
    tokens_per_s = rows_per_s * args.seq_length
    # Megatron counts this iteration's rows after it.
    rows = args.consumed_train_samples + get_current_global_batch_size()
    texts = rows // args.mdm_views + args.mdm_text_offset
    controlled = math.nan
    if summary.draws:
        controlled = control_variate()(summary.loss_sums, summary.weight_sums, summary.draws)
    print(
        f" mdm iteration {iteration:8d} | texts: {texts} | loss: {summary.loss:.4f} |"
        f" controlled loss: {controlled:.4f} | largest weight: {summary.largest_weight:.1f} |"
        f" masked fraction: {summary.masked_fraction:.4f} |"
        f" rows/s: {rows_per_s:.2f} | tokens/s: {tokens_per_s:.1f} |"
        f" loss per rate (t: nats/token) | {summary.text()}",
        flush=True,
    )
    scalars = {
        "mdm/texts": texts,
        "mdm/loss": summary.loss,
        "mdm/controlled loss": controlled,
        "mdm/largest weight": summary.largest_weight,
        "mdm/masked fraction": summary.masked_fraction,
        "mdm/rows per s": rows_per_s,
        "mdm/tokens per s": tokens_per_s,
    }
    _write(scalars | {f"mdm/{k}": v for k, v in _bins(summary).items()}, iteration)


def _log_refit(refit: PpotsFit, iteration: int) -> None:
    parameters = ", ".join(f"{name} {value:.4g}" for name, value in refit.parameters.items())
    t = (torch.arange(10, dtype=torch.float64) + 0.5) / 10
    density = dict(zip(t.tolist(), refit.sampler().density(t).tolist(), strict=True))
    text = " ".join(f"{t:.2f}: {q:.3f}" for t, q in density.items())
    print(
        f" mdm P-POTS refit at iteration {iteration} | {refit.family} of {refit.rows:.0f} rows, "
        f"{refit.moments.skipped} skipped | KL {refit.kl:.2e} | {parameters} | density (t: q) | "
        f"{text}",
        flush=True,
    )
    scalars = {f"mdm/density at t {t:.2f}": q for t, q in density.items()}
    _write({**scalars, "mdm/density KL": refit.kl}, iteration)


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
