"""Why a bell trains faster: objective and sampling apart, in small and in large batches.

Four cells: the objective is the bound or the bell's, masking rates are drawn uniformly or from the
bell, and importance weights make up for the difference. Both bells have a uniform share of 0.1.
Runs of both batches have equally many steps. Two learning rates are tried: the bell's tuned one r
and r / 2 in small batches, r and 2 r in large ones.

The rule of reading, each effect a mean over seeds with a 95% Student interval, of the NELBO at the
end, each cell at the better of its learning rates unless another is named:

    variance     the effect of sampling is above 0 in the small batch, and so is what it has there
                 more than in the large one
    curriculum   the effect of the objective is above 0 in the small batch
    step size    bell and bell beat bound and uniform in the small batch at one learning rate for
                 both, and not when each has its better one

Several may hold. The loss under the bell's own objective is shown beside it and decides nothing.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.race.plan import Run, Shape
from benchmarks.race.results import Record, Results
from benchmarks.race.stages import tune
from benchmarks.race.tables import Table, interval, number
from megatron_mdm.experiments.runs import as_flags
from megatron_mdm.experiments.statistics import mean_interval
from megatron_mdm.objective.types import Floats

NAME = "explain"
MEAN, DEVIATION, SHARE = 0.0, 0.5, 0.1
_BELL = {
    "rate_sampler": "logit-normal",
    "logit_normal": [MEAN, DEVIATION],
    "bell_uniform_share": SHARE,
}
BOUND, BELL = ("bound", "uniform"), ("bell", "bell")
# (objective, sampling): settings, beside those of `uniform`.
CELLS: dict[tuple[str, str], dict[str, Any]] = {
    BOUND: {},
    ("bound", "bell"): {**_BELL, "bell_role": "proposal"},
    ("bell", "uniform"): {**_BELL, "bell_role": "weight"},
    BELL: {**_BELL, "bell_role": "objective"},
}


class Case(NamedTuple):
    """What runs differ by, beside their seeds."""

    objective: str
    sampling: str
    batch: int
    lr: float


Finals = Mapping[Case, Mapping[int, float]]  # a loss at the end, by seed


class Effects(NamedTuple):
    """What one batch size shows, nats per token by seed; above 0 where the bell is better.

    Attributes:
        sampling: uniform minus bell sampling, the mean over both objectives.
        objective: bound minus bell objective, the mean over both samplings.
        tuned: bound and uniform minus bell and bell, each at its better learning rate.
        common: the same where both have this learning rate.
    """

    sampling: list[float]
    objective: list[float]
    tuned: list[float]
    common: dict[float, list[float]]


def runs(results: Results) -> list[Run]:
    """Small batches first, seed by seed, once the bell's rate is known."""
    small, large = results.scale.explain
    return [*_of_shape(results, small, (0.5, 1.0)), *_of_shape(results, large, (1.0, 2.0))]


def _of_shape(results: Results, shape: Shape, factors: tuple[float, ...]) -> list[Run]:
    lr = tune.rate(results, "bell")
    if lr is None:
        return []
    return [
        shape.run(NAME, "uniform", factor * lr, seed, flags=tuple(as_flags(settings)))
        for seed in results.scale.explain_seeds
        for factor in factors
        for settings in CELLS.values()
    ]


def case_of(run: Run) -> Case:
    """The case that a run of this stage is of."""
    cells = {tuple(as_flags(settings)): cell for cell, settings in CELLS.items()}
    return Case(*cells[run.flags], run.rows, run.lr)


def summary(results: Results) -> list[Table]:
    """Losses of all cases, and effects with what they say once all runs are finished."""
    planned = runs(results)
    records = [results[run] for run in planned if run in results]
    if not records:
        return []
    measures: dict[str, Callable[[Record], float]] = {
        "NELBO": lambda record: record.final,
        "the bell's own loss": _bell_loss,
    }
    tables = []
    for name, measure in measures.items():
        finals: dict[Case, dict[int, float]] = {}
        for record in records:
            finals.setdefault(case_of(record.run), {})[record.run.seed] = measure(record)
        tables.append(_losses(f"{NAME}: {name} at the end, mean over seeds", finals))
        if len(records) == len(planned):
            tables.append(_effects(name, finals))
    return tables


def _bell_loss(record: Record) -> float:
    return record.final if math.isinf(record.final) else bell_loss(list(record.bins.values()))


def _losses(title: str, finals: Finals) -> Table:
    columns = sorted({(case.batch, case.lr) for case in finals})
    rows = []
    for objective, sampling in CELLS:
        found = [finals.get(Case(objective, sampling, *column), {}) for column in columns]
        cells = [number(statistics.fmean(x.values())) if x else "" for x in found]
        rows.append([f"{objective}, {sampling}", *cells])
    header = ["objective, sampling", *(f"{batch} rows, rate {lr:g}" for batch, lr in columns)]
    return Table(title, header, rows)


def _effects(name: str, finals: Finals) -> Table:
    found = {batch: effects(finals, batch) for batch in sorted({x.batch for x in finals})}
    lines: dict[str, Callable[[Effects], list[float]]] = {
        "sampling: uniform minus bell": lambda x: x.sampling,
        "objective: bound minus bell": lambda x: x.objective,
        "bound, uniform minus bell, bell": lambda x: x.tuned,
        "the same, lower rate for both": lambda x: x.common[min(x.common)],
        "the same, higher rate for both": lambda x: x.common[max(x.common)],
    }
    rows = [
        [line, *(interval(mean_interval(values(x))) for x in found.values())]
        for line, values in lines.items()
    ]
    notes = []
    if name == "NELBO":
        notes = [f"by the rule: {', '.join(reading(finals)) or 'none is told from chance'}"]
    header = [f"{name} [95%]", *(f"{batch} rows" for batch in found)]
    return Table(f"{NAME}: effects, above 0 where the bell is better", header, rows, notes)


def bell_masses(bins: int) -> Floats:
    """The mass of 0.9 bell + 0.1 in equal bins of the rate [bins]."""
    import numpy as np
    from scipy.special import logit
    from scipy.stats import norm

    ends = norm.cdf(logit(np.linspace(0.0, 1.0, bins + 1)), MEAN, DEVIATION)
    masses: Floats = (1 - SHARE) * np.diff(ends) + SHARE / bins
    return masses


def bell_loss(bins: list[float]) -> float:
    """The loss under the bell's objective, of the mean losses in equal bins of the rate."""
    return float(bell_masses(len(bins)) @ bins)


def effects(finals: Finals, batch: int) -> Effects:
    """The effects in batches of so many rows; all cases have the same seeds."""
    lrs = sorted({case.lr for case in finals if case.batch == batch})

    def better(objective: str, sampling: str) -> Mapping[int, float]:
        of_rates = [finals[Case(objective, sampling, batch, lr)] for lr in lrs]
        return min(of_rates, key=lambda by_seed: statistics.fmean(by_seed.values()))

    def gap(lr: float) -> list[float]:
        one, other = (finals[Case(x, y, batch, lr)] for x, y in (BOUND, BELL))
        return [one[seed] - other[seed] for seed in one]

    exact, proposal, weighted, bell = (better(*cell) for cell in CELLS)
    return Effects(
        sampling=[(exact[s] - proposal[s] + weighted[s] - bell[s]) / 2 for s in exact],
        objective=[(exact[s] - weighted[s] + proposal[s] - bell[s]) / 2 for s in exact],
        tuned=[exact[s] - bell[s] for s in exact],
        common={lr: gap(lr) for lr in lrs},
    )


def reading(finals: Finals) -> list[str]:
    """The explanations that hold by the rule: of `variance`, `curriculum` and `step size`."""
    of_small, of_large = (effects(finals, n) for n in sorted({case.batch for case in finals}))
    shrinks = [a - b for a, b in zip(of_small.sampling, of_large.sampling, strict=True)]
    held = {
        "variance": _is_above_0(of_small.sampling) and _is_above_0(shrinks),
        "curriculum": _is_above_0(of_small.objective),
        "step size": not _is_above_0(of_small.tuned)
        and any(map(_is_above_0, of_small.common.values())),
    }
    return [name for name, holds in held.items() if holds]


def _is_above_0(values: list[float]) -> bool:
    return mean_interval(values).low > 0
