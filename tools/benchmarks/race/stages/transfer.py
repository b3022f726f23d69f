"""Rows of other lengths at the rates of `tune`."""

from benchmarks.race.compare import against
from benchmarks.race.plan import Run, Shape
from benchmarks.race.results import Results
from benchmarks.race.stages import confirm, tune
from benchmarks.race.tables import Table

NAME = "transfer"
CONTENDERS = ("standard", "uniform", "clipped", "bell")


def runs(results: Results) -> list[Run]:
    """Of these contenders and the winner, shape by shape and seed by seed."""
    scale = results.scale
    return [run for shape in scale.transfer for run in of_shape(results, shape)]


def of_shape(results: Results, shape: Shape) -> list[Run]:
    """Those of one shape."""
    rates = rates_of(results, CONTENDERS)
    seeds = results.scale.transfer_seeds
    return [shape.run(NAME, name, lr, seed) for seed in seeds for name, lr in rates.items()]


def rates_of(results: Results, names: tuple[str, ...]) -> dict[str, float]:
    """Rates of those of these contenders that race and of the winner; none before there is one."""
    winner = confirm.winner(results)
    if winner is None:
        return {}
    racing = [name for name in dict.fromkeys([*names, winner]) if name in results.scale.contenders]
    rates = {name: tune.rate(results, name) for name in racing}
    return {name: lr for name, lr in rates.items() if lr is not None}


def summary(results: Results) -> list[Table]:
    """Differences from `standard`, by shape."""
    return [
        compared(results, f"{NAME}: {shape.name()}", of_shape(results, shape), "standard")
        for shape in results.scale.transfer
    ]


def compared(results: Results, title: str, some: list[Run], baseline: str) -> Table:
    """Differences from a baseline of runs of one shape."""
    names = list(dict.fromkeys(run.contender for run in some))
    finals = {name: results.finals(run for run in some if run.contender == name) for name in names}
    return against(title, finals, baseline, [name for name in names if name != baseline])
