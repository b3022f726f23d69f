"""Where the noise of a model's training comes from, over a callable that gives loss and gradient.

First nested draws of rows, rates and masks give A, B and C (objective/variance.py), and the same
rows under a causal mask the C of autoregressive training, which has no other; then batches under
every method give what each leaves of the variance of `standard`. What was measured is kept in a
file, so that an interrupted measurement goes on where it was.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_mdm.data.outputs import complete_or_absent, write_errors
from megatron_mdm.errors import UserError
from megatron_mdm.objective.corruption import Corrupter
from megatron_mdm.objective.fits import fit
from megatron_mdm.objective.pots import RateMoments
from megatron_mdm.objective.randomness import Quantiles, Split, row_uniforms
from megatron_mdm.objective.samplers import RateSampler, Uniform
from megatron_mdm.objective.variance import (
    METHODS,
    CausalStep,
    Floats,
    MethodVariance,
    RowMoments,
    Step,
    batches,
    curve,
    decompose,
    mean,
    method_variance,
    ratio,
    row_moments,
)

SAVE_EVERY = 60.0  # seconds


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        rows: n0, of the nested draws.
        rates: nt of each row, at least 3.
        masks: nm at each rate, at least 2.
        batches: of each method; 0 leaves the methods out.
        batch: rows of a batch, even.
        bins: of t in the curves.
        mask_token_id: id put at masked positions.
        eps: least masking probability of Bernoulli masks.
        seed: of texts, rates and masks.
        subject: names the model, the parameters and the data.
    """

    rows: int
    rates: int
    masks: int
    batches: int
    batch: int
    bins: int
    mask_token_id: int
    eps: float
    seed: int
    subject: str

    @property
    def work(self) -> int:
        """Rows that go through the model in all."""
        texts = sum(method.rows for method in METHODS.values()) * self.batches * self.batch
        return self.rows * self.rates * self.masks + texts

    def __post_init__(self) -> None:
        if self.rows < 2 or self.rates < 3 or self.masks < 2:
            raise UserError("it takes --rows 2, --rates 3 and --masks 2 at least")
        if self.batches == 1 or self.batches < 0 or self.batch < 2 or self.batch % 2:
            raise UserError("--batches must be 0 or at least 2, and --batch even and positive")


class State:
    """What was measured so far, in a file beside the report.

    Args:
        path: the file.
        settings: what is measured.
        writes: whether this process saves; one of several ranks does.

    Attributes:
        rows: for each row t [nt], loss [nt, nm], squared norm of the gradient [nt, nm], and
            mean [d], pattern [nt] and rate [nt] of the gradient's `RowMoments`; and the loss [1]
            and the gradient [d] of its next tokens, both empty without a `CausalStep`.
        methods: what each method was measured to have.
    """

    COLUMNS = ("t", "loss", "norm2", "mean", "pattern", "rate", "causal_loss", "causal_gradient")

    def __init__(self, path: str, settings: Settings, writes: bool = True):
        self.path = path
        self.writes = writes
        self.identity = json.dumps(dataclasses.asdict(settings))
        self.rows: list[dict[str, Floats]] = []
        self.methods: dict[str, MethodVariance] = {}
        self._saved = time.monotonic()
        if os.path.exists(path):
            self._load()

    def _load(self) -> None:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                kept = {name: file[name] for name in file}
            identity, methods = str(kept["identity"]), json.loads(str(kept["scatter"]))
            columns = [kept[name] for name in self.COLUMNS]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{self.path} is damaged: delete it to measure anew") from error
        if identity != self.identity:
            raise UserError(
                f"{self.path} is what was measured with other settings, another checkpoint or "
                "other data: delete it to measure anew, or give another --output"
            )
        self.rows = [
            dict(zip(self.COLUMNS, row, strict=True)) for row in zip(*columns, strict=True)
        ]
        self.methods = {
            name: MethodVariance(np.array(gradient), np.array(loss), masked_fraction)
            for name, (gradient, loss, masked_fraction) in methods.items()
        }

    def save(self, interval: float = 0.0) -> None:
        """Writes the file, unless that was done less than `interval` seconds ago."""
        if not self.writes or time.monotonic() - self._saved < interval or not self.rows:
            return
        methods = {
            name: (m.gradient.tolist(), m.loss.tolist(), m.masked_fraction)
            for name, m in self.methods.items()
        }
        columns = {name: np.stack([row[name] for row in self.rows]) for name in self.COLUMNS}
        with complete_or_absent(self.path) as (temporary,), write_errors(self.path):
            with open(temporary, "wb") as file:
                np.savez(file, identity=self.identity, scatter=json.dumps(methods), **columns)
        self._saved = time.monotonic()


def measure(
    step: Step,
    texts: torch.Tensor,
    eligible: torch.Tensor,
    settings: Settings,
    state: State,
    progress: Callable[[int], Any] = lambda rows: None,
    causal: CausalStep | None = None,
) -> dict[str, Any]:
    """Measures what `state` does not have yet, and puts the report together.

    Args:
        step: the model.
        texts: rows in random order, int64 [N, L]; the first n0 are the nested ones.
        eligible: bool [N, L].
        settings: what to measure.
        state: what was measured before; kept on disk, also when this is interrupted.
        progress: called with rows that were done.
        causal: the same network as an autoregressive model.

    Returns:
        The report, ready for JSON: `loss` and `gradient` with [estimate, standard error] of A, B,
        C and total of one row; `autoregressive`, with C of both, if there is `causal`; `curves`
        over the bins of t; `standard batch`, the variance of a batch; `methods`, relative to it.

    Raises:
        UserError: fewer texts than rows.
    """
    if len(texts) < settings.rows:
        raise UserError(
            f"the data has {len(texts)} whole rows and --rows asks for {settings.rows}: add data "
            "or lower --rows"
        )
    try:
        progress(len(state.rows) * settings.rates * settings.masks)
        for number in range(len(state.rows), settings.rows):
            row = _nested(step, texts[number], eligible[number], settings, number)
            row |= _next_tokens(causal, texts[number], eligible[number])
            state.rows.append(row)
            state.save(SAVE_EVERY)
            progress(settings.rates * settings.masks)
        if settings.batches:
            samplers = _fit(state, settings)
            for name, method in METHODS.items():
                if name not in state.methods:
                    source = batches(
                        texts,
                        eligible,
                        method,
                        samplers[method.target],
                        settings.mask_token_id,
                        settings.eps,
                        settings.batch,
                        settings.seed + 1,
                    )
                    state.methods[name] = method_variance(step, source, settings.batches)
                    state.save()
                progress(settings.batches * settings.batch * method.rows)
    finally:
        state.save()
    return _report(state, settings, texts.shape[1])


def _nested(
    step: Step, text: torch.Tensor, eligible: torch.Tensor, settings: Settings, number: int
) -> dict[str, Floats]:
    """All draws of one row; rates are independent, as the analysis of variance asks."""
    corrupter = Corrupter(Uniform(), "bernoulli", settings.mask_token_id, settings.eps)
    quantiles = Quantiles("iid", settings.seed, Split.TEST)
    tokens, able = text[None], eligible[None]
    shape = (settings.rates, settings.masks)
    loss, gradients, rates = np.zeros(shape), [], np.zeros(settings.rates)
    for i, k in np.ndindex(*shape):
        cell = number * settings.rates + i
        uniforms = row_uniforms(settings.seed, Split.TEST, cell * settings.masks + k, len(text))
        corruption = corrupter(
            tokens, able, torch.from_numpy(uniforms)[None], torch.tensor([quantiles(cell)])
        )
        loss[i, k], gradient = step(tokens, able, corruption)
        gradients.append(gradient.numpy())
        rates[i] = float(corruption.t)
    draws = np.stack(gradients).reshape(*shape, -1)
    moments = row_moments(draws)
    norm2 = (draws.astype(np.float64) ** 2).sum(axis=2)
    return {"t": rates, "loss": loss, "norm2": norm2, **vars(moments)}


def _next_tokens(
    causal: CausalStep | None, text: torch.Tensor, eligible: torch.Tensor
) -> dict[str, Floats]:
    """The same row as autoregressive training sees it, where nothing is drawn."""
    if causal is None:
        return {"causal_loss": np.zeros(0), "causal_gradient": np.zeros(0)}
    loss, gradient = causal(text[None], eligible[None])
    return {"causal_loss": np.array([loss]), "causal_gradient": gradient.numpy()}


def _fit(state: State, settings: Settings) -> dict[str | None, RateSampler]:
    """Densities for P-POTS from the nested draws."""
    samplers: dict[str | None, RateSampler] = {None: Uniform()}
    num_draws = settings.rows * settings.rates * settings.masks
    for target, column, power in (("loss", "loss", 1.0), ("gradient", "norm2", 0.5)):
        moments = RateMoments(min(30, max(2, num_draws // 20)))
        values = np.stack([row[column] for row in state.rows]) ** power
        t = np.stack([row["t"] for row in state.rows])[:, :, None] * np.ones(settings.masks)
        flat = torch.from_numpy(values.ravel())
        moments.update(torch.from_numpy(t.ravel()), flat, torch.ones_like(flat))
        samplers[target] = fit(moments, target=target, eps=settings.eps).sampler()
    return samplers


def _report(state: State, settings: Settings, length: int) -> dict[str, Any]:
    t = np.stack([row["t"] for row in state.rows])
    loss = [row_moments(row["loss"][:, :, None]) for row in state.rows]
    gradient = [RowMoments(row["mean"], row["pattern"], row["rate"]) for row in state.rows]
    report: dict[str, Any] = {"settings": dataclasses.asdict(settings), "length": length}
    means = np.stack([row["loss"].mean(axis=1) for row in state.rows])
    report["curves"] = {"mean loss": curve(t, means, settings.bins)}
    for name, rows in (("loss", loss), ("gradient", gradient)):
        report[name] = dataclasses.asdict(decompose(rows, settings.masks, seed=settings.seed))
        for letter, part in (("A", "pattern"), ("B", "rate")):
            values = np.stack([getattr(row, part) for row in rows])
            report["curves"][f"{name} {letter}"] = curve(t, values, settings.bins)
    if len(state.rows[0]["causal_loss"]):
        report["autoregressive"] = {}
        for name in ("loss", "gradient"):
            # Without rates and masks the variance between rows is C itself.
            rows = [
                RowMoments(row[f"causal_{name}"], np.zeros(1), np.zeros(1)) for row in state.rows
            ]
            found = decompose(rows, settings.masks, seed=settings.seed)
            report["autoregressive"][name] = {"C": found.C}
    report["methods"] = []
    if state.methods:
        standard = state.methods["standard"]
        report["standard batch"] = {
            "gradient": mean(standard.gradient),
            "loss": mean(standard.loss),
        }
    for name, measured in state.methods.items():
        method = METHODS[name]
        report["methods"].append(
            {
                "method": name,
                "per": method.per,
                "gradient": ratio(measured.gradient, standard.gradient),
                "loss": ratio(measured.loss, standard.loss),
                "rows": settings.batch * method.rows,
                "texts": settings.batch * method.rows // method.views,
                "masked_fraction": measured.masked_fraction,
                "head_tokens": measured.masked_fraction * settings.batch * method.rows * length,
            }
        )
    return report


def as_text(report: dict[str, Any]) -> str:
    """The report as a table."""
    lines = [f"{'variance of one row':24s}" + "".join(f"{k:>28s}" for k in ("loss", "gradient"))]
    for part, meaning in (("A", "mask pattern"), ("B", "rate"), ("C", "data"), ("total", "")):
        cells = ""
        for name in ("loss", "gradient"):
            value, error = report[name][part]
            share = value / report[name]["total"][0]
            cells += f"{value:12.4g} +- {error:<8.2g} {share:4.0%}"
        lines.append(f"{part:6s}{meaning:18s}{cells}")
    if "autoregressive" in report:
        cells = ""
        for name in ("loss", "gradient"):
            value, error = report["autoregressive"][name]["C"]
            share = value / report[name]["total"][0]
            cells += f"{value:12.4g} +- {error:<8.2g} {share:4.0%}"
        lines.append(f"{'C     autoregressive':24s}{cells}")
    if report["methods"]:
        lines.append("")
        lines.append(
            f"{'variance / standard':42s}{'per':5s}{'gradient':>17s}{'loss':>17s}"
            f"{'rows':>6s}{'texts':>6s}{'masked':>7s}{'head tokens':>12s}"
        )
    for row in report["methods"]:
        cells = "".join("{:8.3f} +- {:.3f}".format(*row[name]) for name in ("gradient", "loss"))
        lines.append(
            f"{row['method']:42s}{row['per']:5s}{cells}{row['rows']:6d}{row['texts']:6d}"
            f"{row['masked_fraction']:7.0%}{row['head_tokens']:12.0f}"
        )
    return "\n".join(lines)


def draw_figure(report: dict[str, Any], path: str) -> None:
    """Bars of A, B and C, their curves over t, and the methods; PNG or SVG by the suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names, colors = ("loss", "gradient"), {"A": "C0", "B": "C1", "C": "C2"}
    figure, (shares, curves, methods) = plt.subplots(
        1, 3, figsize=(13, 4), layout="constrained", width_ratios=[1, 1.6, 1.6]
    )
    bars = [
        ("A: mask pattern", "A", report),
        ("B: rate", "B", report),
        ("C: data", "C", report),
        ("C, autoregressive", "C", report.get("autoregressive")),
    ]
    for i, (label, part, source) in enumerate(bars):
        if source is None:
            continue
        values, errors = (
            [source[n][part][k] / report[n]["total"][0] for n in names] for k in (0, 1)
        )
        places = [x + 0.21 * (i - 1.5) for x in range(2)]
        color = colors[part] if source is report else "0.6"
        shares.bar(places, values, 0.19, yerr=errors, capsize=3, label=label, color=color)
    shares.set(xticks=range(2), xticklabels=names, ylabel="share of the variance of one row")
    shares.legend()
    bins = report["settings"]["bins"]
    for name, style in zip(names, ("--", "-"), strict=True):
        total = report[name]["total"][0]
        for part in ("A", "B"):
            points = [
                ((i + 0.5) / bins, point[0] / total, point[1] / total)
                for i, point in enumerate(report["curves"][f"{name} {part}"])
                if point is not None
            ]
            if points:
                x, y, e = zip(*points, strict=True)
                label = f"{part}(t), {name}"
                curves.errorbar(x, y, e, fmt=f"o{style}", ms=3, label=label, color=colors[part])
    curves.set(xlabel="masking rate t", ylabel="relative to the total", xlim=(0, 1))
    curves.set_yscale("symlog", linthresh=0.1)
    curves.legend()
    rows = report["methods"][::-1]
    for i, name in enumerate(names[::-1]):
        values, errors = ([row[name][k] for row in rows] for k in (0, 1))
        places = [y + 0.36 * (i - 0.5) for y in range(len(rows))]
        methods.barh(places, values, 0.34, xerr=errors, label=name, color=f"C{4 - i}")
    methods.set(yticks=range(len(rows)), yticklabels=[row["method"] for row in rows])
    methods.set(xlabel="variance relative to standard")
    methods.axvline(1.0, color="k", lw=0.8)
    if rows:
        methods.legend(loc="lower right")
    with complete_or_absent(path) as (temporary,), write_errors(path):
        figure.savefig(temporary, dpi=150, format=path.rpartition(".")[2])
    plt.close(figure)
