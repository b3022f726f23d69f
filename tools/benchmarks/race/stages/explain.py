"""The stage `explain`: why a bell trains faster. It separates objective and sampling.

There are four cells. The objective is the bound or the bell's objective; masking rates are drawn
uniformly or from the bell; importance weights correct for the difference. Both bells have a uniform
share of 0.1. There are small and large batches, with equal numbers of steps, so that large batches
see more rows. Two learning rates are tried: the bell's tuned one times 0.5 and 1 in small batches,
and times 1 and 2 in large batches.

The rule is about effects: differences of the NELBO at the end, below 0 if the bell is better. Each
effect is a mean over seeds with a 95% Student interval. Each cell has the better of its two
learning rates, unless the rule names another.

    variance     the effect of sampling is below 0 in the small batch, and it is lower there than in
                 the large one: their difference is below 0
    curriculum   the effect of the objective is below 0 in the small batch
    step size    in the small batch the effect of both at one learning rate for both cells is below
                 0, and less than half of it is left where each has its better learning rate: the
                 low end of that interval is above half of the first mean

Several may hold. The loss under the bell's own objective is shown beside it and decides nothing.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
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
    """The settings by which runs differ, apart from their seeds."""

    objective: str
    sampling: str
    batch: int
    lr: float


Finals = Mapping[Case, Mapping[int, float]]  # case -> seed -> a loss at the end


class Effects(NamedTuple):
    """The effects at one batch size by seed, in nats per token; below 0 if the bell is better.

    Attributes:
        sampling: bell minus uniform sampling, the mean over both objectives.
        objective: bell minus bound objective, the mean over both samplings.
        tuned: bell objective with bell sampling minus bound with uniform sampling, each at its
            better learning rate.
        common: learning rate -> the same difference with this learning rate for both.
    """

    sampling: list[float]
    objective: list[float]
    tuned: list[float]
    common: dict[float, list[float]]


def runs(results: Results) -> list[Run]:
    """Returns the runs, small batches first, once the bell's learning rate is known."""
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
    """Returns the case of a run of this stage."""
    cells = {tuple(as_flags(settings)): cell for cell, settings in CELLS.items()}
    return Case(*cells[run.flags], run.rows, run.lr)


def summary(results: Results) -> list[Table]:
    """Makes tables of all cases' losses and, once all runs are finished, of the effects."""
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
        notes = results.origins(planned)
        tables.append(_losses(f"{NAME}: {name} at the end, mean over seeds", finals, notes))
        if len(records) == len(planned):
            tables.append(_effects(name, finals, notes))
    return tables


def _bell_loss(record: Record) -> float:
    return record.final if math.isinf(record.final) else bell_loss(list(record.bins.values()))


def _losses(title: str, finals: Finals, notes: Sequence[str]) -> Table:
    columns = sorted({(case.batch, case.lr) for case in finals})
    rows = []
    for objective, sampling in CELLS:
        found = [finals.get(Case(objective, sampling, *column), {}) for column in columns]
        cells = [number(statistics.fmean(x.values())) if x else "" for x in found]
        rows.append([f"{objective}, {sampling}", *cells])
    of_columns = (f"{batch} rows, learning rate {lr:g}" for batch, lr in columns)
    return Table(title, ["objective, sampling", *of_columns], rows, notes)


def _effects(name: str, finals: Finals, notes: Sequence[str]) -> Table:
    found = {batch: effects(finals, batch) for batch in sorted({x.batch for x in finals})}
    lines: dict[str, Callable[[Effects], list[float]]] = {
        "sampling: bell minus uniform": lambda x: x.sampling,
        "objective: bell minus bound": lambda x: x.objective,
        "both: bell, bell minus bound, uniform": lambda x: x.tuned,
        "both, the lower learning rate for both": lambda x: x.common[min(x.common)],
        "both, the higher learning rate for both": lambda x: x.common[max(x.common)],
    }
    rows = [
        [line, *(interval(mean_interval(values(x))) for x in found.values())]
        for line, values in lines.items()
    ]
    small, large = found
    said = [
        f"after equally many steps batches of {large} rows have seen {large / small:g} times the "
        f"rows: what differs from {small} rows may come of the batch or of the longer training"
    ]
    if name == "NELBO":
        said.insert(0, f"by the rule: {', '.join(reading(finals)) or 'none is told from chance'}")
    header = [f"{name} [95%]", *(f"{batch} rows" for batch in found)]
    title = f"{NAME}: effects, below 0 where the bell is better"
    return Table(title, header, rows, [*said, *notes])


def bell_masses(bins: int) -> Floats:
    """Returns the mass of the density 0.9 bell + 0.1 in equal bins of the rate [bins]."""
    import numpy as np
    from scipy.special import logit
    from scipy.stats import norm

    ends = norm.cdf(logit(np.linspace(0.0, 1.0, bins + 1)), MEAN, DEVIATION)
    masses: Floats = (1 - SHARE) * np.diff(ends) + SHARE / bins
    return masses


def bell_loss(bins: list[float]) -> float:
    """Computes the loss under the bell's objective from mean losses in equal bins of the rate."""
    return float(bell_masses(len(bins)) @ bins)


def effects(finals: Finals, batch: int) -> Effects:
    """Computes the effects in batches of `batch` rows; all cases have the same seeds."""
    lrs = sorted({case.lr for case in finals if case.batch == batch})

    def better(objective: str, sampling: str) -> Mapping[int, float]:
        of_rates = [finals[Case(objective, sampling, batch, lr)] for lr in lrs]
        return min(of_rates, key=lambda by_seed: statistics.fmean(by_seed.values()))

    def gap(lr: float) -> list[float]:
        one, other = (finals[Case(x, y, batch, lr)] for x, y in (BOUND, BELL))
        return [other[seed] - one[seed] for seed in one]

    exact, proposal, weighted, bell = (better(*cell) for cell in CELLS)
    return Effects(
        sampling=[(proposal[s] - exact[s] + bell[s] - weighted[s]) / 2 for s in exact],
        objective=[(weighted[s] - exact[s] + bell[s] - proposal[s]) / 2 for s in exact],
        tuned=[bell[s] - exact[s] for s in exact],
        common={lr: gap(lr) for lr in lrs},
    )


def reading(finals: Finals) -> list[str]:
    """Returns which of `variance`, `curriculum` and `step size` hold by the rule."""
    of_small, of_large = (effects(finals, n) for n in sorted({case.batch for case in finals}))
    shrinks = [a - b for a, b in zip(of_small.sampling, of_large.sampling, strict=True)]
    tuned = mean_interval(of_small.tuned)
    common = [mean_interval(values) for values in of_small.common.values()]
    held = {
        "variance": _is_below_0(of_small.sampling) and _is_below_0(shrinks),
        "curriculum": _is_below_0(of_small.objective),
        "step size": any(x.high < 0 and tuned.low > x.value / 2 for x in common),
    }
    return [name for name, holds in held.items() if holds]


def _is_below_0(values: list[float]) -> bool:
    return mean_interval(values).high < 0
