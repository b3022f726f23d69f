"""The stage `transfer`: rows of other lengths at the learning rates from `tune`."""

from benchmarks.race.compare import against
from benchmarks.race.plan import Run, Shape
from benchmarks.race.results import Finals, Results
from benchmarks.race.stages import confirm, tune
from benchmarks.race.tables import Table

NAME = "transfer"
CONTENDERS = ("standard", "uniform", "clipped", "bell")


def runs(results: Results) -> list[Run]:
    """Returns the runs of these contenders and the winner, shape by shape and seed by seed."""
    scale = results.scale
    return [run for shape in scale.transfer for run in of_shape(results, shape)]


def of_shape(results: Results, shape: Shape) -> list[Run]:
    """Returns the runs of one shape."""
    rates = rates_of(results, CONTENDERS)
    seeds = results.scale.transfer_seeds
    return [shape.run(NAME, name, lr, seed) for seed in seeds for name, lr in rates.items()]


def rates_of(results: Results, names: tuple[str, ...]) -> dict[str, float]:
    """Returns the learning rates of the winner and of those of `names` that race.

    Empty while the winner is not known.
    """
    winner = confirm.winner(results)
    if winner is None:
        return {}
    racing = [name for name in dict.fromkeys([*names, winner]) if name in results.scale.contenders]
    rates = {name: tune.rate(results, name) for name in racing}
    return {name: lr for name, lr in rates.items() if lr is not None}


def summary(results: Results) -> list[Table]:
    """Makes tables of differences from `standard`, by shape."""
    return [
        table
        for shape in results.scale.transfer
        for table in compared(
            f"{NAME}: {shape.name()}", results, of_shape(results, shape), "standard"
        )
    ]


def finals(results: Results, shape: Shape) -> Finals:
    """Returns the final NELBO of one shape's runs, by contender and seed."""
    return results.finals(of_shape(results, shape))


def compared(title: str, results: Results, runs: list[Run], baseline: str) -> list[Table]:
    """Makes a table of the differences from a baseline, as soon as there is one."""
    found = results.finals(runs)
    names = [name for name in found if name != baseline]
    if baseline not in found or not names:
        return []
    return [against(title, found, baseline, names, notes=results.origins(runs))]
