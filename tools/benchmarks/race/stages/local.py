"""The stage `local`: a control on rows without local structure, whose best loss is known.

If a bell trains faster because neighbors predict a token, it gains nothing on the rows of
unigram.py. The rule uses the bell's gap to the best loss as a share of `uniform`'s gap, at the end
and in the mean over the evaluations: the mean logarithm over seeds, with Student's 95% interval.
The explanation stands if both intervals lie within STANDS. It falls if both lie below. Each
contender has its own tuned learning rate.
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
LEAST_GAP = 0.02  # nats per token: if `uniform`'s gap is smaller, a share of it says little
DECISIVE = ("at the end", "mean over the run")
HEADINGS = (*DECISIVE, "t below 0.1", "t above 0.9")
Gaps = dict[str, dict[str, dict[int, float]]]


def runs(results: Results) -> list[Run]:
    """Returns the runs seed by seed, once the learning rates are known."""
    rates = {name: tune.rate(results, name) for name in CONTENDERS}
    return [
        results.scale.local.run(NAME, name, lr, seed, data="unigram")
        for seed in results.scale.local_seeds
        for name, lr in rates.items()
        if lr is not None
    ]


def summary(results: Results) -> list[Table]:
    """Makes the table of gaps to the best loss: at the end, over the run, at extreme rates."""
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
    """Computes the gaps of HEADINGS; they are infinite for a run that diverged.

    Args:
        record: result of the run.
        best: `best_losses_of` the held-out rows.
    """
    if math.isinf(record.final):
        return [math.inf] * len(HEADINGS)
    bins = list(record.bins.values())
    of_bins = unigram.per_bin(best, len(bins))
    losses = [record.final, statistics.fmean(record.nelbo), bins[0], bins[-1]]
    least = [best.mean(), best.mean(), of_bins[0], of_bins[-1]]
    return [float(loss - bound) for loss, bound in zip(losses, least, strict=True)]


def reading(gaps: Gaps) -> str:
    """Applies the rule about locality to the gaps of HEADINGS by contender and seed."""
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
    """Returns a gap's share of the baseline's gap, as geometric mean over seeds.

    The share is NaN if one of the gaps is not above 0 or is infinite.

    Args:
        gaps: gaps by seed.
        baseline: the baseline's gaps by seed.
    """
    pairs = [(value, baseline[seed]) for seed, value in gaps.items() if seed in baseline]
    logs = [
        math.log(value / base) if 0 < value < math.inf and 0 < base < math.inf else math.nan
        for value, base in pairs
    ]
    return Interval(*map(math.exp, mean_interval(logs)))


def _cells(gaps: Mapping[str, Mapping[int, float]], name: str) -> list[str]:
    """Formats the mean gap over seeds, and its share of the baseline's."""
    if not gaps[name]:
        return ["", ""]
    mean = number(statistics.fmean(gaps[name].values()))
    is_known = name != BASELINE and gaps[name].keys() & gaps[BASELINE].keys()
    return [mean, interval(share(gaps[name], gaps[BASELINE]), ".3f") if is_known else ""]
