"""Control for locality: rows in which nothing is local, and of which the best loss is known.

If a bell trains faster because neighbours tell a token, it gains nothing on the rows of unigram.py.
By the rule its gap to the best loss, minus that of `uniform`, is read at the end and in the mean
over the evaluations. The explanation stands if both 95% Student intervals over seeds lie within a
quarter of the difference in `confirm`, on either side of 0. It falls if both lie below 0. Each
contender has its own tuned rate.
"""

import math
import statistics
from collections.abc import Mapping

from benchmarks.race import unigram
from benchmarks.race.plan import Run
from benchmarks.race.results import Record, Results, differences
from benchmarks.race.stages import confirm, tune
from benchmarks.race.tables import Table, interval, number
from megatron_mdm.experiments.statistics import mean_interval
from megatron_mdm.objective.types import Floats

NAME = "local"
CONTENDERS = ("standard", "uniform", "bell")
BASELINE = "uniform"
DECISIVE = ("at the end", "mean over the run")
HEADINGS = (*DECISIVE, "t below 0.1", "t above 0.9")
Gaps = dict[str, dict[str, dict[int, float]]]


def runs(results: Results) -> list[Run]:
    """Seed by seed, once the rates are known."""
    rates = {name: tune.rate(results, name) for name in CONTENDERS}
    return [
        results.scale.local.run(NAME, name, lr, seed, data="unigram")
        for seed in results.scale.local_seeds
        for name, lr in rates.items()
        if lr is not None
    ]


def summary(results: Results) -> list[Table]:
    """Gaps to the best loss: at the end, over the run, at the ends of the rates."""
    planned = runs(results)
    records = [results[run] for run in planned if run in results]
    if not records:
        return []
    shape = results.scale.local
    rows = unigram.held_out_rows(shape.length, results.scale.held_out)
    best = unigram.best_losses_of(rows, unigram.SYMBOLS, unigram.CONCENTRATION)
    # Heading -> contender -> seed -> gap.
    gaps: Gaps = {heading: {name: {} for name in CONTENDERS} for heading in HEADINGS}
    for record in records:
        for heading, gap in zip(HEADINGS, gaps_of(record, best), strict=True):
            gaps[heading][record.run.contender][record.run.seed] = gap
    header = ["gap to the best loss"]
    for heading in HEADINGS:
        header += [heading, f"minus {BASELINE} [95%]"]
    lines = [[name, *(x for h in HEADINGS for x in _cells(gaps[h], name))] for name in CONTENDERS]
    notes = [f"best loss of the held-out rows: {best.mean():.4f} nats per token"]
    if len(records) == len(planned):
        notes.append(f"by the rule: {reading(gaps, _in_confirm(results))}")
    return [Table(f"{NAME}: {shape.name()}, independent tokens", header, lines, notes)]


def gaps_of(record: Record, best: Floats) -> list[float]:
    """The gaps of HEADINGS, infinite for a run that has diverged.

    Args:
        record: of the run.
        best: of `best_losses_of` its held-out rows.
    """
    if math.isinf(record.final):
        return [math.inf] * len(HEADINGS)
    bins = list(record.bins.values())
    of_bins = unigram.per_bin(best, len(bins))
    losses = [record.final, statistics.fmean(record.nelbo), bins[0], bins[-1]]
    least = [best.mean(), best.mean(), of_bins[0], of_bins[-1]]
    return [float(loss - bound) for loss, bound in zip(losses, least, strict=True)]


def reading(gaps: Gaps, in_confirm: float) -> str:
    """What the rule says of locality.

    Args:
        gaps: of HEADINGS, by contender and seed.
        in_confirm: mean difference of `bell` from `uniform` in `confirm`, NaN if it is not known.
    """
    found = [mean_interval(differences(gaps[x]["bell"], gaps[x][BASELINE])) for x in DECISIVE]
    margin = abs(in_confirm) / 4
    vanishes = all(-margin <= gap.low and gap.high <= margin for gap in found)
    remains = all(gap.high < 0.0 for gap in found)
    if vanishes == remains:
        return "undecided"
    return f"the bell's gain {'vanishes' if vanishes else 'remains'} where nothing is local"


def _in_confirm(results: Results) -> float:
    finals = confirm.finals(results)
    less = differences(finals.get("bell", {}), finals.get(BASELINE, {}))
    return statistics.fmean(less) if less else math.nan


def _cells(gaps: Mapping[str, Mapping[int, float]], name: str) -> list[str]:
    """The mean over seeds, and that of the differences from the baseline."""
    less = differences(gaps[name], gaps[BASELINE]) if name != BASELINE else []
    mean = number(statistics.fmean(gaps[name].values())) if gaps[name] else ""
    return [mean, interval(mean_interval(less)) if less else ""]
