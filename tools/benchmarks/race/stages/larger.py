"""The stage `larger`: longer rows, a larger model and more steps, on few seeds."""

from benchmarks.race.plan import Run, Shape
from benchmarks.race.results import Results
from benchmarks.race.stages import transfer
from benchmarks.race.tables import Table

NAME = "larger"
CONTENDERS = ("uniform", "clipped")


def runs(results: Results) -> list[Run]:
    """Returns the runs of these contenders and the winner, shape by shape and seed by seed."""
    return [run for shape in results.scale.larger for run in _of_shape(results, shape)]


def _of_shape(results: Results, shape: Shape) -> list[Run]:
    models = results.scale.models
    # With Adam the best learning rate is inversely proportional to the width of the model.
    narrower = models[results.scale.main.model].width / models[shape.model].width
    rates = transfer.rates_of(results, CONTENDERS)
    return [
        shape.run(NAME, name, lr * narrower, seed)
        for seed in results.scale.larger_seeds
        for name, lr in rates.items()
    ]


def summary(results: Results) -> list[Table]:
    """Makes tables of differences from `uniform`, by shape."""
    return [
        table
        for shape in results.scale.larger
        for table in transfer.compared(
            f"{NAME}: {shape.name()}", results, _of_shape(results, shape), "uniform"
        )
    ]
