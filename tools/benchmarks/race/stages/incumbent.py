"""The stage `incumbent`: the settings that `recommended` had when the race began.

They are compared with those that may replace them. The stage tunes their learning rate, and uses
the seeds of `confirm` and `transfer`.
"""

from benchmarks.race.compare import against
from benchmarks.race.contenders import INCUMBENT
from benchmarks.race.plan import Run, Shape
from benchmarks.race.results import Finals, Results
from benchmarks.race.stages import confirm, transfer, tune
from benchmarks.race.tables import Table

NAME = "incumbent"
(CONTENDER,) = INCUMBENT


def runs(results: Results) -> list[Run]:
    """Returns the grid of learning rates, then the seeds at the best one, shape by shape."""
    scale = results.scale
    seeds = [run for shape in (scale.main, *scale.transfer) for run in _of_shape(results, shape)]
    return [*_grid(results), *seeds]


def _grid(results: Results) -> list[Run]:
    return tune.grid(results, CONTENDER, NAME)


def _of_shape(results: Results, shape: Shape) -> list[Run]:
    scale, lr = results.scale, tune.best(results, _grid(results))
    if lr is None:
        return []
    seeds = scale.confirm_seeds if shape == scale.main else scale.transfer_seeds
    return [shape.run(NAME, CONTENDER, lr, seed) for seed in seeds]


def is_complete(results: Results) -> bool:
    """Whether all runs are finished."""
    return all(run in results for run in runs(results))


def finals(results: Results, shape: Shape) -> Finals:
    """Returns the incumbent's final NELBO by seed, in one shape."""
    return results.finals(_of_shape(results, shape))


def summary(results: Results) -> list[Table]:
    """Makes tables of its learning rates, and of its challengers' differences from it by shape."""
    tables = tune.table(results, {CONTENDER: _grid(results)}, f"{NAME}, its learning rate")
    winner = confirm.winner(results)
    for shape in (results.scale.main, *results.scale.transfer):
        is_main = shape == results.scale.main
        others = confirm.runs(results) if is_main else transfer.of_shape(results, shape)
        names = confirm.challengers(results) if is_main else [winner] if winner else []
        found = {**results.finals(others), **finals(results, shape)}
        if CONTENDER in found and any(name in found for name in names):
            made = [run for run in others if run.contender in names]
            notes = results.origins([*made, *_of_shape(results, shape)])
            title = f"{NAME}: {shape.name()}"
            tables.append(against(title, found, CONTENDER, names, is_main, notes))
    return tables
