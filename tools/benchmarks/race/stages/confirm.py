"""The stage `confirm`: the contenders at their tuned learning rates on fresh seeds; the winner."""

import statistics

from benchmarks.race.compare import against
from benchmarks.race.contenders import MAIN
from benchmarks.race.plan import Run
from benchmarks.race.results import Finals, Results
from benchmarks.race.stages import tune
from benchmarks.race.tables import Table

NAME = "confirm"


def runs(results: Results) -> list[Run]:
    """Returns the runs seed by seed, so that finished ones can be compared early."""
    scale = results.scale
    rates = {name: tune.rate(results, name) for name in scale.contenders}
    return [
        scale.main.run(NAME, name, lr, seed)
        for seed in scale.confirm_seeds
        for name, lr in rates.items()
        if lr is not None
    ]


def finals(results: Results) -> Finals:
    """Returns final NELBO by contender and seed, for finished runs."""
    return results.finals(runs(results))


def challengers(results: Results) -> list[str]:
    """Returns the contenders that may win: those with an exact end, except `standard`."""
    return [x for x in results.scale.contenders if MAIN[x].is_exact and x != "standard"]


def winner(results: Results) -> str | None:
    """Returns the challenger with the lowest mean final NELBO; None while a run is missing."""
    known = finals(results)
    found = {name: list(known.get(name, {}).values()) for name in challengers(results)}
    if any(len(values) < len(results.scale.confirm_seeds) for values in found.values()):
        return None
    return min(found, key=lambda name: statistics.fmean(found[name]))


def summary(results: Results) -> list[Table]:
    """Makes tables of differences from `standard`, and of challengers from `clipped` and `bell`."""
    found = finals(results)
    title = f"{NAME}: {results.scale.main.name()}"
    exact = challengers(results)
    families = {
        "standard": [name for name in results.scale.contenders if name != "standard"],
        "clipped": exact,
        "bell": exact,
    }
    notes = results.origins(runs(results))
    return [
        against(title, found, baseline, names, is_family=True, notes=notes)
        for baseline, names in families.items()
        if baseline in found and any(name in found for name in names)
    ]
