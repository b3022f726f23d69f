"""Paired differences of contenders from one of them."""

from collections.abc import Sequence

from benchmarks.race.results import Finals, differences
from benchmarks.race.tables import Table, interval, number
from megatron_mdm.experiments.statistics import holm, mean_interval, t_test


def against(title: str, finals: Finals, baseline: str, names: Sequence[str]) -> Table:
    """Every seed's final NELBO, the mean difference from the baseline, and its test.

    Args:
        title: of the table.
        finals: final NELBO by contender and seed.
        baseline: contender that the others are compared with.
        names: of the others, which are one family of tests.
    """
    base = finals.get(baseline, {})
    pairs = {name: differences(finals[name], base) for name in names}
    p = {name: t_test(values) for name, values in pairs.items()}
    adjusted = holm(p)
    seeds = sorted({seed for name in [baseline, *names] for seed in finals.get(name, {})})
    rows = []
    for name in [baseline, *names]:
        cells = [number(finals[name][s]) if s in finals.get(name, {}) else "" for s in seeds]
        values = pairs.get(name, [])
        less = interval(mean_interval(values)) if values else ""
        test = [number(p[name], ".2g"), number(adjusted[name], ".2g")] if values else ["", ""]
        rows.append([name, *cells, less, *test])
    header = [
        "final NELBO",
        *(f"seed {seed}" for seed in seeds),
        f"minus {baseline} [95%]",
        "p",
        "p (Holm)",
    ]
    return Table(f"{title}, minus {baseline}", header, rows)
