"""Control for locality: rows in which nothing is local, and of which the best loss is known.

If a bell trains faster because neighbours tell a token, it gains nothing on the rows of unigram.py:
by the rule its gap to the best loss does not differ from that of `uniform`, neither at the end nor
in the mean over the evaluations, by a 95% Student interval over seeds. Each contender has its own
tuned rate.
"""

import statistics
from collections.abc import Mapping

from benchmarks.race import unigram
from benchmarks.race.plan import Run
from benchmarks.race.results import Results, differences
from benchmarks.race.stages import tune
from benchmarks.race.tables import Table, interval, number
from megatron_mdm.experiments.statistics import Interval, mean_interval

NAME = "local"
CONTENDERS = ("standard", "uniform", "bell")
BASELINE = "uniform"


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
    records = [results[run] for run in runs(results) if run in results]
    if not records:
        return []
    shape = results.scale.local
    rows = unigram.held_out_rows(shape.length, results.scale.held_out)
    best = unigram.best_losses_of(rows, unigram.SYMBOLS, unigram.CONCENTRATION)
    of_bins = unigram.per_bin(best, len(records[0].bins))
    # Column -> contender -> seed -> gap.
    gaps: dict[str, dict[str, dict[int, float]]] = {
        heading: {name: {} for name in CONTENDERS}
        for heading in ("at the end", "mean over the run", "t below 0.1", "t above 0.9")
    }
    for record in records:
        bins = list(record.bins.values())
        values = (
            record.final - best.mean(),
            statistics.fmean(record.nelbo) - best.mean(),
            bins[0] - of_bins[0],
            bins[-1] - of_bins[-1],
        )
        for column, value in zip(gaps.values(), values, strict=True):
            column[record.run.contender][record.run.seed] = float(value)
    header = ["gap to the best loss", *(x for h in gaps for x in (h, f"minus {BASELINE} [95%]"))]
    lines = [
        [name, *(cell for column in gaps.values() for cell in _cells(column, name))]
        for name in CONTENDERS
    ]
    notes = [f"best loss of the held-out rows: {best.mean():.4f} nats per token"]
    decisive = [
        mean_interval(differences(gaps[heading]["bell"], gaps[heading][BASELINE]))
        for heading in ("at the end", "mean over the run")
        if gaps[heading]["bell"] and gaps[heading][BASELINE]
    ]
    if len(records) == len(runs(results)):
        notes.append(f"by the rule: {reading(decisive)}")
    return [Table(f"{NAME}: {shape.name()}, independent tokens", header, lines, notes)]


def reading(gaps: list[Interval]) -> str:
    """What differences of the bell's gaps from `uniform`'s say of locality."""
    if all(gap.low <= 0.0 <= gap.high for gap in gaps):
        return "the bell's gain vanishes where nothing is local"
    if all(gap.high < 0.0 for gap in gaps):
        return "the bell gains where nothing is local"
    return "undecided"


def _cells(gaps: Mapping[str, Mapping[int, float]], name: str) -> list[str]:
    """The mean over seeds, and that of the differences from the baseline."""
    less = differences(gaps[name], gaps[BASELINE]) if name != BASELINE else []
    mean = number(statistics.fmean(gaps[name].values())) if gaps[name] else ""
    return [mean, interval(mean_interval(less)) if less else ""]
