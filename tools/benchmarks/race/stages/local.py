"""Control for locality: rows in which nothing is local, and of which the best loss is known.

If a bell trains faster because neighbours tell a token, it gains nothing on the rows of unigram.py.
By the rule its gap to the best loss is read as a share of that of `uniform`, at the end and in the
mean over the evaluations: the mean logarithm over seeds, with Student's 95% interval. The
explanation stands if both intervals lie within STANDS. It falls if both lie below. Each contender
has its own tuned learning rate.
"""

import math
import statistics
from collections.abc import Mapping

from benchmarks.race import unigram
from benchmarks.race.plan import Run
from benchmarks.race.results import Record, Results
from benchmarks.race.stages import tune
from benchmarks.race.tables import Table, interval, number
from megatron_mdm.experiments.statistics import Interval, mean_interval
from megatron_mdm.objective.types import Floats

NAME = "local"
CONTENDERS = ("standard", "uniform", "bell")
BASELINE = "uniform"
STANDS = (0.9, 1.1)
LEAST_GAP = 0.02  # nats per token of `uniform`, below which a share of it says little
DECISIVE = ("at the end", "mean over the run")
HEADINGS = (*DECISIVE, "t below 0.1", "t above 0.9")
Gaps = dict[str, dict[str, dict[int, float]]]


def runs(results: Results) -> list[Run]:
    """Seed by seed, once the learning rates are known."""
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
        header += [heading, f"share of {BASELINE}'s [95%]"]
    lines = [[name, *(x for h in HEADINGS for x in _cells(gaps[h], name))] for name in CONTENDERS]
    notes = [f"best loss of the held-out rows: {best.mean():.4f} nats per token"]
    notes.append(f"share of {BASELINE}'s: geometric mean over seeds; below 1 is better")
    if len(records) == len(planned):
        notes.append(f"by the rule: {reading(gaps)}")
    notes += results.origins(planned)
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


def reading(gaps: Gaps) -> str:
    """What the rule says of locality, of the gaps of HEADINGS by contender and seed."""
    found = [share(gaps[x]["bell"], gaps[x][BASELINE]) for x in DECISIVE]
    least = min(statistics.fmean(gaps[x][BASELINE].values()) for x in DECISIVE)
    low, high = STANDS
    if least >= LEAST_GAP:
        if all(low <= x.low and x.high <= high for x in found):
            return "the bell's gain vanishes where nothing is local"
        if all(x.high < low for x in found):
            return "the bell's gain remains where nothing is local"
        if all(x.low > high for x in found):
            return "the bell loses where nothing is local, which speaks for something else"
    return "undecided"


def share(gaps: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """The geometric mean over seeds of a gap's share of the baseline's; NaN if one is not above 0.

    Args:
        gaps: by seed.
        baseline: by seed.
    """
    pairs = [(value, baseline[seed]) for seed, value in gaps.items() if seed in baseline]
    logs = [
        math.log(value / base) if 0 < value < math.inf and 0 < base < math.inf else math.nan
        for value, base in pairs
    ]
    return Interval(*map(math.exp, mean_interval(logs)))


def _cells(gaps: Mapping[str, Mapping[int, float]], name: str) -> list[str]:
    """The mean over seeds, and its share of the baseline's."""
    if not gaps[name]:
        return ["", ""]
    mean = number(statistics.fmean(gaps[name].values()))
    is_known = name != BASELINE and gaps[name].keys() & gaps[BASELINE].keys()
    return [mean, interval(share(gaps[name], gaps[BASELINE]), ".3f") if is_known else ""]
