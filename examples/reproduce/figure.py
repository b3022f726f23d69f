"""The results as a picture: answers of every seed, deviations, and where the noise comes from."""

import statistics
from collections.abc import Mapping
from typing import Any

from methods import METHODS, SCARCE
from tables import (
    MOMENTS,
    Entries,
    Result,
    answers,
    by_setting,
    measured,
    noise,
    parts,
)

from megatron_mdm.experiments.statistics import Interval, deviation_interval
from megatron_mdm.files import complete_or_absent, write_errors


def draw(results: Result, path: str) -> None:
    """Draws to a .png or .svg file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = by_setting(results)
    ran = {name for entries in found.values() for name in entries}
    names = [name for name in METHODS if name in ran]
    columns = max(3, len(found))
    figure = plt.figure(figsize=(3.2 * columns + 3, 0.52 * len(names) + 5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.2, 1])
    upper = above.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (setting, entries) in zip(upper, found.items(), strict=True):
        _answers(axes, entries, names)
        axes.set(title=setting.title, xlabel="right answers (%)")
    label_rows(upper[0], names)
    spread, shares, variances = below.subplots(1, 3, width_ratios=[1, 0.8, 1.2])
    # The setting with most seeds, and that with the paper's two claims, unless it was not run.
    setting = SCARCE if SCARCE in found else next(iter(found))
    _deviations(spread, found[setting])
    if measured(found[setting]):
        _parts(shares, found[setting])
        _noise(variances, found[setting])
    below.suptitle(setting.title)
    with complete_or_absent(path) as (temporary,), write_errors(path):
        figure.savefig(temporary, dpi=100, format=path.rpartition(".")[2])
    plt.close(figure)


def label_rows(axes: Any, names: list[str]) -> None:
    """Names one below the other."""
    axes.set_yticks([-place for place in range(len(names))], names)
    axes.set_ylim(0.5 - len(names), 0.5)


def _answers(axes: Any, entries: Entries, names: list[str]) -> None:
    for place, name in enumerate(names):
        values = answers(entries.get(name, []))
        if values:
            axes.plot(values, [-place] * len(values), "o", color="C0", ms=3.5, alpha=0.6)
            axes.plot([statistics.fmean(values)], [-place], "|", color="C3", ms=14, mew=2)
    if "standard" in entries:
        axes.axvline(statistics.fmean(answers(entries["standard"])), color="0.7", lw=0.8, zorder=0)


def _intervals(axes: Any, found: Mapping[str, Interval], color: str, shift: float = 0.0) -> None:
    for place, interval in enumerate(found.values()):
        axes.plot([interval.low, interval.high], [shift - place] * 2, "-", color=color)
        axes.plot([interval.value], [shift - place], "o", color=color, ms=4)


def _deviations(axes: Any, entries: Entries) -> None:
    found = {
        name: deviation_interval(answers(runs)) for name, runs in entries.items() if len(runs) > 1
    }
    _intervals(axes, found, "C0")
    label_rows(axes, list(found) or ["no method has two seeds"])
    axes.set(title="deviation between seeds", xlabel="points of right answers, 95%")


def _parts(axes: Any, entries: Entries) -> None:
    for place, what in enumerate(("loss", "gradient")):
        for x, moment in enumerate(MOMENTS):
            bottom = 0.0
            for number, (part, share) in enumerate(parts(entries, what, moment).items()):
                label = f"{part}: {('mask pattern', 'rate', 'data')[number]}"
                axes.bar(
                    x + 4 * place,
                    share.value,
                    bottom=bottom,
                    color=f"C{number}",
                    label=None if x or place else label,
                )
                bottom += share.value
    axes.set_xticks([*range(3), *range(4, 7)], MOMENTS * 2, rotation=60)
    axes.set(title="variance of one row: loss, gradient", ylabel="share")
    axes.legend(fontsize="small", loc="lower center")


def _noise(axes: Any, entries: Entries) -> None:
    for number, moment in enumerate(MOMENTS):
        found = noise(entries, moment)
        _intervals(axes, found, f"C{number}", 0.25 * (1 - number))
        axes.plot([], [], "o-", color=f"C{number}", label=moment)
        label_rows(axes, list(found))
    axes.axvline(1.0, color="0.7", lw=0.8, zorder=0)
    axes.set(title="variance of a batch's gradient", xlabel="relative to standard", xscale="log")
    axes.legend(fontsize="small")
