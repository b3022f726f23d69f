"""Draws the results: right answers of every seed, deviations, and the sources of the noise."""

import math
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
    smoke_test,
)

from megatron_mdm.experiments.statistics import Interval, deviation_interval
from megatron_mdm.pictures import (
    BLUE,
    COLORS,
    GREY,
    MARKERS,
    ORANGE,
    PALE,
    blank_figure,
    legend_below,
    limits,
    point_out,
    save,
    use_log_scale,
)

ROW = 0.55  # height of a method's row in inches
SPREAD = 0.8  # part of a row's height over which its seeds are spread


def draw(results: Result, path: str) -> None:
    """Draws results to a .png or .svg file."""
    with blank_figure() as figure:
        fill(figure, results)
        save(figure, path)


def fill(figure: Any, results: Result) -> None:
    """Draws results into an empty figure."""
    found = by_setting(results)
    ran = {name for entries in found.values() for name in entries}
    names = [name for name in METHODS if name in ran]
    heights = (ROW * len(names) + 1.6, ROW * max(4, len(names)) + 2.0)
    figure.set_size_inches(3.2 * max(3, len(found)) + 3, sum(heights))
    figure.suptitle(smoke_test(results), color=ORANGE)
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    upper = above.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (setting, entries) in zip(upper, found.items(), strict=True):
        _answers(axes, entries, names)
        axes.set(title=setting.title, xlabel="right answers (%)")
    label_rows(upper[0], names)
    legend_below(upper[0])
    # The scarce setting has the most seeds and tests the paper's two claims. It may not have been
    # run.
    setting = SCARCE if SCARCE in found else next(iter(found))
    below.suptitle(setting.title)
    if not measured(found[setting]):
        _deviations(below.subplots(), found[setting])
        return
    spread, shares, variances = below.subplots(1, 3, width_ratios=[1, 0.8, 1.2])
    _deviations(spread, found[setting])
    _parts(shares, found[setting])
    _noise(variances, found[setting])


def label_rows(axes: Any, names: list[str]) -> None:
    """Labels the rows of a plot with names, one below the other."""
    axes.set_yticks([-place for place in range(len(names))], names)
    axes.set_ylim(0.5 - len(names), 0.5)


def _answers(axes: Any, entries: Entries, names: list[str]) -> None:
    """Draws each seed of each method, joined by a line to the same seed of `standard`."""
    base = {run["seed"]: 100 * run["answers"] for run in entries.get("standard", [])}
    seeds = dict.fromkeys(run["seed"] for runs in entries.values() for run in runs)
    order = sorted(seeds, key=lambda seed: -base.get(seed, math.inf))
    low, high = limits([x for runs in entries.values() for x in answers(runs)])
    axes.set_xlim(max(0.0, low), min(100.0, high))
    for place, name in enumerate(names):
        values = {run["seed"]: 100 * run["answers"] for run in entries.get(name, [])}
        own = [seed for seed in order if seed in values]
        ys = [SPREAD * (0.5 - (i + 0.5) / len(own)) - place for i in range(len(own))]
        for seed, y in zip(own, ys, strict=True):
            if name != "standard" and seed in base:
                axes.plot([base[seed], values[seed]], [y, y], "-", color=GREY, lw=0.7)
                axes.plot(base[seed], y, "|", color=GREY, ms=3)
            axes.plot(values[seed], y, "o", color=BLUE, ms=2.6, **_whole(axes, values[seed]))
        if own:
            mean = statistics.fmean(values.values())
            reach = [-place - 0.45, -place + 0.45]
            axes.plot([mean, mean], reach, color=ORANGE, lw=2.0, **_whole(axes, mean, 2.8))
            point_out(axes, list(values.values()), -place, BLUE)
    if base:
        axes.axvline(statistics.fmean(base.values()), color=PALE, lw=0.8, zorder=0)
    axes.plot([], [], "o", color=BLUE, ms=2.6, label="a seed")
    axes.plot([], [], "|-", color=GREY, lw=0.7, ms=5, label="to the same seed of `standard`")
    axes.plot([], [], color=ORANGE, lw=2.0, label="mean")


def _whole(axes: Any, x: float, zorder: float = 3.0) -> dict[str, Any]:
    """Returns the style of a mark at x: above the frame, and not clipped if it is at the edge."""
    low, high = axes.get_xlim()
    return {"clip_on": not low <= x <= high, "zorder": zorder}


def _intervals(
    axes: Any, found: Mapping[str, Interval], number: int = 0, shift: float = 0.0
) -> None:
    """Draws intervals one below the other; the limits of the x axis are already set."""
    color = COLORS[number]
    for place, interval in enumerate(found.values()):
        y = shift - place
        axes.plot([interval.low, interval.high], [y, y], "-", color=color)
        look = _whole(axes, interval.value)
        axes.plot([interval.value], [y], MARKERS[number], color=color, **look)
        point_out(axes, interval, y, color, ".2g")


def _ends(found: list[Interval]) -> list[float]:
    """Returns all finite values and ends of intervals."""
    return [x for interval in found for x in interval if math.isfinite(x)]


def _deviations(axes: Any, entries: Entries) -> None:
    found = {
        name: deviation_interval(answers(runs)) for name, runs in entries.items() if len(runs) > 1
    }
    if found:
        low, high = limits(_ends(list(found.values())))
        axes.set_xlim(max(0.0, low), high)
    _intervals(axes, found)
    label_rows(axes, list(found) or ["no method has two seeds"])
    axes.set(title="Deviation between seeds", xlabel="points of right answers, 95%")


def _parts(axes: Any, entries: Entries) -> None:
    """Draws A, B and C side by side, not stacked: estimates of small shares can be negative."""
    for place, what in enumerate(("loss", "gradient")):
        for x, moment in enumerate(MOMENTS):
            for number, (part, share) in enumerate(parts(entries, what, moment).items()):
                label = f"{part}: {('mask pattern', 'rate', 'data')[number]}"
                axes.errorbar(
                    x + 4 * place + 0.22 * (number - 1),
                    share.value,
                    [[share.value - share.low], [share.high - share.value]],
                    fmt=MARKERS[number],
                    color=COLORS[number],
                    label=None if x or place else label,
                )
    axes.axhline(0.0, color=GREY, lw=0.8, zorder=0)
    axes.set_xticks([*range(3), *range(4, 7)], MOMENTS * 2, rotation=90)
    axes.set(title="Variance of one row", xlabel="of the loss, of the gradient")
    axes.set_ylabel("share, 95%")
    legend_below(axes, inches=0.75)


def _noise(axes: Any, entries: Entries) -> None:
    by_moment = [noise(entries, moment) for moment in MOMENTS]
    ends = _ends([interval for found in by_moment for interval in found.values()])
    low, high = limits([math.log(x) for x in ends])
    axes.set_xlim(math.exp(low), math.exp(high))
    use_log_scale(axes.xaxis)
    for number, (moment, found) in enumerate(zip(MOMENTS, by_moment, strict=True)):
        _intervals(axes, found, number, 0.25 * (1 - number))
        axes.plot([], [], f"{MARKERS[number]}-", color=COLORS[number], label=moment)
        label_rows(axes, list(found))
    axes.axvline(1.0, color=GREY, lw=0.8, zorder=0)
    axes.set(title="Variance of a batch's gradient", xlabel="relative to standard")
    legend_below(axes, columns=3)
