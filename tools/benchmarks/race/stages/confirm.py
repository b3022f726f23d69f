"""The contenders at their rates on fresh seeds, and the winner."""

import statistics

from benchmarks.race.compare import against
from benchmarks.race.contenders import MAIN
from benchmarks.race.plan import Run
from benchmarks.race.results import Results
from benchmarks.race.stages import tune
from benchmarks.race.tables import Table

NAME = "confirm"


def runs(results: Results) -> list[Run]:
    """Seed by seed, so that what is finished can be compared."""
    scale = results.scale
    return [
        run for seed in scale.confirm_seeds for run in _of_seed(results, scale.contenders, seed)
    ]


def _of_seed(results: Results, names: tuple[str, ...], seed: int) -> list[Run]:
    rates = {name: tune.rate(results, name) for name in names}
    main = results.scale.main
    return [main.run(NAME, name, lr, seed) for name, lr in rates.items() if lr is not None]


def finals(results: Results) -> dict[str, dict[int, float]]:
    """Final NELBO by contender and seed."""
    return {
        name: results.finals(run for run in runs(results) if run.contender == name)
        for name in results.scale.contenders
    }


def challengers(results: Results) -> list[str]:
    """Contenders that may win: they end exact, and are not what the others are compared with."""
    return [x for x in results.scale.contenders if MAIN[x].is_exact and x != "standard"]


def winner(results: Results) -> str | None:
    """The one of them with the least mean of final NELBO; None as long as a run is missing."""
    found = {name: list(finals(results)[name].values()) for name in challengers(results)}
    if any(len(values) < len(results.scale.confirm_seeds) for values in found.values()):
        return None
    return min(found, key=lambda name: statistics.fmean(found[name]))


def summary(results: Results) -> list[Table]:
    """Differences from `standard`; of those that may win from the two that do not end exact."""
    found = {name: values for name, values in finals(results).items() if values}
    title = f"{NAME}: {results.scale.main.name()}"
    exact = [name for name in challengers(results) if name in found]
    families = {
        "standard": [name for name in found if name != "standard"],
        "clipped": exact,
        "bell": exact,
    }
    return [
        against(title, found, baseline, names)
        for baseline, names in families.items()
        if baseline in found and names
    ]
