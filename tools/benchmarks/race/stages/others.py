"""The stage `others`: variants and known recipes on one seed each, outside the claims."""

from benchmarks.race.compare import against
from benchmarks.race.contenders import OTHERS
from benchmarks.race.plan import Run
from benchmarks.race.results import Results
from benchmarks.race.stages import confirm, tune
from benchmarks.race.tables import Table

NAME = "others"


def runs(results: Results) -> list[Run]:
    """Returns the runs on the first seed of `confirm`, each at the rate of its `rate_of`."""
    scale = results.scale
    rates = {name: tune.rate(results, name) for name in scale.others}
    seed = scale.confirm_seeds[0]
    return [scale.main.run(NAME, name, lr, seed) for name, lr in rates.items() if lr is not None]


def summary(results: Results) -> list[Table]:
    """Makes a table of these and of the contenders on the same seed."""
    seed = results.scale.confirm_seeds[0]
    found = {
        name: {seed: values[seed]}
        for name, values in confirm.finals(results).items()
        if seed in values
    }
    for run in runs(results):
        if run in results:
            found[run.contender] = {seed: results[run].final}
    names = [name for name in found if name != "standard"]
    title = f"{NAME}: {results.scale.main.name()}"
    if not any(name in OTHERS for name in names):
        return []
    beside = [run for run in confirm.runs(results) if run.seed == seed]
    notes = results.origins([*beside, *runs(results)])
    return [against(title, found, "standard", names, notes=notes)]
