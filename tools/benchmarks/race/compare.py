"""Paired differences of contenders from a baseline contender."""

import math
from collections.abc import Sequence

from benchmarks.race.results import Finals, differences
from benchmarks.race.tables import Table, interval, number
from megatron_mdm.experiments.statistics import holm, mean_interval, t_test

LEAST_SEEDS = 3  # smallest number of seeds for which a table has p values


def against(
    title: str,
    finals: Finals,
    baseline: str,
    names: Sequence[str],
    is_family: bool = False,
    notes: Sequence[str] = (),
) -> Table:
    """Makes a table of final NELBO by seed, mean difference from the baseline, and its test.

    Args:
        title: title of the table.
        finals: final NELBO by contender and seed.
        baseline: contender that the others are compared with.
        names: the other contenders; those without results have no line.
        is_family: whether RULES.md declares the tests of all `names` as one family.
        notes: notes below the table.
    """
    base = finals.get(baseline, {})
    pairs = {name: differences(finals.get(name, {}), base) for name in names}
    shown = [name for name in [baseline, *names] if finals.get(name)]
    seeds = sorted({seed for name in shown for seed in finals[name]})
    tests = {}
    if len(seeds) >= LEAST_SEEDS:
        tests = {"p": {name: t_test(values) for name, values in pairs.items()}}
        if is_family:
            tests["p (Holm)"] = adjusted(finals, baseline, names)
    rows = []
    for name in shown:
        cells = [number(finals[name][s]) if s in finals[name] else "" for s in seeds]
        values = pairs.get(name, [])
        less = interval(mean_interval(values)) if values else ""
        ps = [number(p[name], ".2g") if values else "" for p in tests.values()]
        rows.append([name, *cells, less, *ps])
    header = [
        "final NELBO",
        *(f"seed {seed}" for seed in seeds),
        f"minus {baseline} [95%]",
        *tests,
    ]
    return Table(f"{title}, minus {baseline}: below 0 is better", header, rows, notes)


def adjusted(finals: Finals, baseline: str, family: Sequence[str]) -> dict[str, float]:
    """Returns Holm's adjusted p values of a family of contenders' differences from a baseline.

    A contender may have no test, because one of its runs diverged or is missing. It still counts in
    the family: the others are adjusted for the planned number of tests.
    """
    base = finals.get(baseline, {})
    p = {name: t_test(differences(finals.get(name, {}), base)) for name in family}
    found = holm({name: 1.0 if math.isnan(value) else value for name, value in p.items()})
    return {name: math.nan if math.isnan(p[name]) else found[name] for name in family}
