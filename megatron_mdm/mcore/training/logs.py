"""Log lines beside Megatron's own, printed and written to TensorBoard and Weights & Biases.

Only the last rank calls these functions, because it has the writers.
"""

import math

import torch
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.training import get_tensorboard_writer, get_wandb_writer

from megatron_mdm.bound import why_no_bound
from megatron_mdm.mcore.training.metrics import Summary
from megatron_mdm.mcore.training.state import TrainingState
from megatron_mdm.objective.ppots.fit import FitError, PpotsFit


def log_training(
    state: TrainingState,
    summary: Summary,
    iteration: int,
    seconds: float,
    flops: float | None = None,
) -> None:
    """Writes the line of a log interval.

    Args:
        state: state of the run.
        summary: statistics of the rows of the interval.
        iteration: last iteration of the interval.
        seconds: duration of the interval.
        flops: useful operations of all ranks in the interval; None without --log-throughput.
    """
    rows_per_s = summary.rows / seconds
    tokens_per_s = rows_per_s * state.seq_length
    # Megatron adds this iteration's rows to its count only after the iteration.
    rows = state.consumed_rows + get_current_global_batch_size()
    data_rows = rows // state.mdm.views + state.text_offset
    per_gpu = {}
    if flops is not None:
        per_gpu = {
            "tokens/s per GPU": tokens_per_s / state.world_size,
            "useful TFLOP/s per GPU": flops / seconds / state.world_size / 1e12,
        }
    controlled = math.nan
    if summary.draws:
        masses = state.objective_masses(summary.uniform_share)
        controlled = state.control_variate(
            summary.loss_sums, summary.weight_sums, summary.draws, masses
        )
    # The logged loss is a mean over the interval, so the density's share is a mean as well.
    reason = why_no_bound(state.mdm, summary.uniform_share)
    bound = "yes" if reason is None else f"no ({reason})"
    print(
        f" mdm iteration {iteration:8d} | data rows: {data_rows} | loss: {summary.loss:.4f} |"
        f" controlled loss: {controlled:.4f} | bound: {bound} |"
        f" largest weight: {summary.largest_weight:.1f} |"
        f" masked fraction: {summary.masked_fraction:.4f} |"
        f" rows/s: {rows_per_s:.2f} | tokens/s: {tokens_per_s:.1f} |"
        + "".join(f" {name}: {value:.5g} |" for name, value in per_gpu.items())
        + f" loss per rate (t: nats/token) | {summary.text()}",
        flush=True,
    )
    scalars = {
        "mdm/data rows": data_rows,
        "mdm/loss": summary.loss,
        "mdm/controlled loss": controlled,
        "mdm/is bound": float(reason is None),
        "mdm/largest weight": summary.largest_weight,
        "mdm/masked fraction": summary.masked_fraction,
        "mdm/rows per s": rows_per_s,
        "mdm/tokens per s": tokens_per_s,
    }
    scalars |= {f"mdm/{name.replace('/s', ' per s')}": value for name, value in per_gpu.items()}
    if state.mdm.bell is not None:
        scalars["mdm/uniform share"] = summary.uniform_share
    _write(scalars | {f"mdm/{k}": v for k, v in _bins(summary).items()}, iteration)


def log_refit(result: PpotsFit | FitError, skipped: int, iteration: int) -> None:
    """Writes the line of a new density of P-POTS, or of the reason why there is none.

    Args:
        result: result of the fit.
        skipped: number of rows that were left out because their value was not finite.
        iteration: iteration after which the fit was made.
    """
    if isinstance(result, FitError):
        print(
            f" mdm P-POTS keeps its density at iteration {iteration} | "
            f"{skipped} rows skipped | {result} "
            "(--mdm-ppots-refit-interval, --mdm-ppots-bins)",
            flush=True,
        )
        return
    parameters = ", ".join(f"{name} {value:.4g}" for name, value in result.parameters.items())
    t = (torch.arange(10, dtype=torch.float64) + 0.5) / 10
    density = dict(zip(t.tolist(), result.sampler().density(t).tolist(), strict=True))
    text = " ".join(f"{t:.2f}: {q:.3f}" for t, q in density.items())
    print(
        f" mdm P-POTS refit at iteration {iteration} | {result.family} of {result.rows:.0f} rows, "
        f"{result.moments.skipped} skipped | KL {result.kl:.2e} | {parameters} | density (t: q) | "
        f"{text}",
        flush=True,
    )
    scalars = {f"mdm/density at t {t:.2f}": q for t, q in density.items()}
    _write({**scalars, "mdm/density KL": result.kl}, iteration)


def log_evaluation(
    name: str, summary: Summary, error_by_text: tuple[float, int], iteration: int
) -> None:
    """Writes the line of an evaluation.

    Args:
        name: name of the evaluated data: `validation`, `validation NAME` for a named set, or
            `test`.
        summary: statistics of its rows.
        error_by_text: standard error of the mean, and the number of different texts among the rows;
            see `Recorder.by_text`.
        iteration: iteration after which the evaluation was made.
    """
    stderr, texts = error_by_text
    of = f"{summary.rows} rows"
    of += f", {texts} of them different" if texts < summary.rows else ""
    print(
        f" {name} NELBO: {summary.loss:.4f} +- {stderr:.4f} nats/token (mean over {of}) | "
        f"per rate (t: nats/token) | {summary.text()}",
        flush=True,
    )
    scalars = {"NELBO": summary.loss, "NELBO stderr": stderr, **_bins(summary)}
    _write({f"mdm/{name} {key}": value for key, value in scalars.items()}, iteration)


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
