"""The stage `tune`: the learning rate of each contender, on a seed that is only for tuning."""

from collections.abc import Mapping

from benchmarks.race.contenders import CONTENDERS
from benchmarks.race.plan import Run
from benchmarks.race.results import Results
from benchmarks.race.tables import Table, number

NAME = "tune"


def runs(results: Results) -> list[Run]:
    """Returns each contender's grid of learning rates, with its extensions."""
    return [run for name in results.scale.contenders for run in grid(results, name)]


def summary(results: Results) -> list[Table]:
    """Makes the table of final NELBO by learning rate."""
    return table(results, {name: grid(results, name) for name in results.scale.contenders}, NAME)


def table(results: Results, grids: Mapping[str, list[Run]], title: str) -> list[Table]:
    """Makes a table of final NELBO by contender and learning rate, once a run is finished."""
    finals = {
        name: {run.lr: results[run].final for run in runs if run in results}
        for name, runs in grids.items()
    }
    rates = sorted({lr for found in finals.values() for lr in found})
    rows = []
    for name, found in finals.items():
        cells = [number(found[lr]) if lr in found else "" for lr in rates]
        lr = best(results, grids[name])
        rows.append([name, *cells, "" if lr is None else f"{lr:g}"])
    shape, seed = results.scale.main, results.scale.tune_seed
    header = ["final NELBO at a learning rate of", *(f"{lr:g}" for lr in rates), "chosen"]
    notes = results.origins(run for runs in grids.values() for run in runs)
    text = f"{title}: {shape.name()}, seed {seed}"
    return [Table(text, header, rows, notes)] if rates else []


def rate(results: Results, name: str) -> float | None:
    """Returns the learning rate of a contender, None while it is not known.

    A contender outside the claims uses that of the contender that it is a variant of.
    """
    name = CONTENDERS[name].rate_of or name
    return best(results, grid(results, name)) if name in results.scale.contenders else None


def best(results: Results, grid: list[Run]) -> float | None:
    """Returns the learning rate with the lowest final NELBO; of equal ones, the smaller one.

    Returns None while a run of the grid is missing.
    """
    if not all(run in results for run in grid):
        return None
    return min(grid, key=lambda run: (results[run].final, run.lr)).lr


def grid(results: Results, name: str, stage: str = NAME) -> list[Run]:
    """Returns the grid of learning rates, extended by factors of 2 while its edge is the best."""
    scale = results.scale
    runs = [scale.main.run(stage, name, lr, scale.tune_seed) for lr in scale.rates]
    least, most = scale.rates[0] / 2**scale.extensions, scale.rates[-1] * 2**scale.extensions
    while all(run in results for run in runs):
        found = min(runs, key=lambda run: (results[run].final, run.lr))
        if found is runs[-1] and found.lr < most:
            runs.append(scale.main.run(stage, name, 2 * found.lr, scale.tune_seed))
        elif found is runs[0] and found.lr > least:
            runs.insert(0, scale.main.run(stage, name, found.lr / 2, scale.tune_seed))
        else:
            break
    return runs
