"""The stage `ending`: losses of a bell at extreme rates, and schedules that end exact.

The learning rate warms up, stays constant, and decays over the last fifth of the steps, so that
most of the steps after the bell have a constant learning rate. All contenders use the bell's tuned
learning rate. `uniform` also runs at its own, since the bell's rate is a handicap for it. judge.py
judges the trained models.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.race.judge import REMASKING
from benchmarks.race.plan import Run
from benchmarks.race.results import Results, differences
from benchmarks.race.stages import tune
from benchmarks.race.tables import Table, interval, number
from megatron_mdm.experiments.statistics import mean_interval

NAME = "ending"
BELL = "bell throughout"


class Ending(NamedTuple):
    """A line of the tables.

    Attributes:
        contender: key of CONTENDERS.
        flags: flags that override the contender's own.
        rate_of: the contender whose tuned learning rate it uses.
    """

    contender: str
    flags: tuple[str, ...] = ()
    rate_of: str = "bell"


ENDINGS = {
    "uniform, at the bell's learning rate": Ending("uniform"),
    "uniform, at its own": Ending("uniform", rate_of="uniform"),
    BELL: Ending("bell"),
    "fade from 40% to 70%": Ending("bell-fade", ("--mdm-bell-fade", "0.4", "0.7")),
    "hard switch at 50%": Ending("bell-fade", ("--mdm-bell-fade", "0.5", "0.5")),
}


class Column(NamedTuple):
    """A column of a table: the mean over seeds of a number from judge.py.

    Attributes:
        heading: heading of the column.
        measure, part: keys of the number in the result of judge.py.
        compared: whether a column with differences from the bell follows.
    """

    heading: str
    measure: str
    part: str
    compared: bool = True


LOSSES = [
    Column("all rates", "nelbo", "value"),
    Column("t below 0.1", "below 0.1", "value"),
    Column("t above 0.9", "above 0.9", "value"),
]
TEXTS = [
    column
    for remasking in REMASKING
    for column in (
        Column(f"NLL, {remasking}", remasking, "nll"),
        Column("distinct 4-grams", remasking, "distinct", compared=False),
    )
]
Judged = Mapping[int, Mapping[str, Mapping[str, float]]]  # seed -> result of judge.py


def runs(results: Results) -> list[Run]:
    """Returns the runs seed by seed, once the learning rates are known."""
    found = [run for name in ENDINGS for run in _of_ending(results, name)]
    # If two learning rates are equal, two lines have the same runs.
    return sorted(dict.fromkeys(found), key=lambda run: run.seed)


def _of_ending(results: Results, name: str) -> list[Run]:
    contender, flags, rate_of = ENDINGS[name]
    lr, shape = tune.rate(results, rate_of), results.scale.main
    if lr is None:
        return []
    decay = f"--lr-wsd-decay-style linear --lr-wsd-decay-iters {shape.steps // 5}"
    flags = ("--lr-decay-style", "WSD", *decay.split(), *flags)
    return [
        shape.run(NAME, contender, lr, seed, flags=flags, judged=True)
        for seed in results.scale.ending_seeds
    ]


def summary(results: Results) -> list[Table]:
    """Makes tables of losses at all and at extreme rates, and of the judge's results on texts."""
    judged = {name: _judged(results, name) for name in ENDINGS}
    known = [found for by_seed in judged.values() for found in by_seed.values()]
    if not known:
        return []
    largest = [max(x[column.measure]["stderr"] for x in known) for column in LOSSES]
    losses = (
        "standard error of one model, by the choice of rows and their masks, which all share: "
        f"{', '.join(map(number, largest))}"
    )
    texts = (
        "NLL: nats per token under the autoregressive judge, from the second token of a row on; "
        "random remasking samples from the model, low-confidence keeps likely tokens first"
    )
    title = f"{NAME}: {results.scale.main.name()}, warm-up, stable, decay"
    below = f"minus {BELL}: by seed; below 0 is better"
    origins = results.origins(runs(results))
    held_out = [known[0]["held out"][column.part] for column in TEXTS]
    return [
        _table(f"{title}; nats per token", judged, LOSSES, [losses, below, *origins]),
        _table(
            f"{title}; texts that the models write",
            judged,
            TEXTS,
            [texts, f"{below}, unless a text repeats itself", *origins],
            held_out,
        ),
    ]


def _judged(results: Results, name: str) -> Judged:
    found = [results[run] for run in _of_ending(results, name) if run in results]
    return {record.run.seed: record.judged for record in found if record.judged}


def _table(
    title: str,
    judged: Mapping[str, Judged],
    columns: Sequence[Column],
    notes: Sequence[str],
    held_out: Sequence[float] = (),
) -> Table:
    """Makes a table with a line for each contender, and one for held-out text."""
    rows = [[name, str(len(judged[name]))] for name in ENDINGS]
    rows += [["held-out text", ""]] if held_out else []
    header = ["", "seeds"]
    for place, column in enumerate(columns):
        values = {
            name: {seed: found[column.measure][column.part] for seed, found in by_seed.items()}
            for name, by_seed in judged.items()
        }
        header += [column.heading] + [f"minus {BELL} [95%]"] * column.compared
        for row, name in zip(rows, ENDINGS, strict=False):
            mine, less = list(values[name].values()), differences(values[name], values[BELL])
            row.append(number(statistics.fmean(mine)) if mine else "")
            if column.compared:
                is_known = less and name != BELL
                row.append(interval(mean_interval(less)) if is_known else "")
        if held_out:
            rows[-1] += [number(held_out[place])] + [""] * column.compared
    return Table(title, header, rows, notes)
