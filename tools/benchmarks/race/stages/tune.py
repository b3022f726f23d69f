"""The learning rate of each contender, on a seed that nothing else is measured on."""

from benchmarks.race.contenders import CONTENDERS
from benchmarks.race.plan import Run
from benchmarks.race.results import Results
from benchmarks.race.tables import Table, number

NAME = "tune"


def runs(results: Results) -> list[Run]:
    """The grid of every contender, and what is added to it."""
    return [run for name in results.scale.contenders for run in _grid(results, name)]


def summary(results: Results) -> list[Table]:
    """Final NELBO by rate."""
    finals = {
        name: {run.lr: results[run].final for run in _grid(results, name) if run in results}
        for name in results.scale.contenders
    }
    rates = sorted({lr for found in finals.values() for lr in found})
    rows = []
    for name, found in finals.items():
        cells = [number(found[lr]) if lr in found else "" for lr in rates]
        lr = rate(results, name)
        rows.append([name, *cells, "" if lr is None else f"{lr:g}"])
    shape, seed = results.scale.main, results.scale.tune_seed
    header = ["final NELBO at a rate of", *(f"{lr:g}" for lr in rates), "chosen"]
    return [Table(f"tune: {shape.name()}, seed {seed}", header, rows)] if rates else []


def rate(results: Results, name: str) -> float | None:
    """The rate of a contender, None as long as it is not known.

    Of the grid that with the least final NELBO, of equal ones the smaller one. A contender outside
    the claims has that of the one that it is a variant of.
    """
    name = CONTENDERS[name].rate_of or name
    grid = _grid(results, name)
    if name not in results.scale.contenders or not all(run in results for run in grid):
        return None
    return min(grid, key=lambda run: (results[run].final, run.lr)).lr


def _grid(results: Results, name: str) -> list[Run]:
    """The grid of rates, longer by a factor of 2 while the best one lies at its edge."""
    scale = results.scale
    grid = [scale.main.run(NAME, name, lr, scale.tune_seed) for lr in scale.rates]
    least, most = scale.rates[0] / 2**scale.extensions, scale.rates[-1] * 2**scale.extensions
    while all(run in results for run in grid):
        best = min(grid, key=lambda run: (results[run].final, run.lr))
        if best is grid[-1] and best.lr < most:
            grid.append(scale.main.run(NAME, name, 2 * best.lr, scale.tune_seed))
        elif best is grid[0] and best.lr > least:
            grid.insert(0, scale.main.run(NAME, name, best.lr / 2, scale.tune_seed))
        else:
            break
    return grid
