"""Draws results: curves of the contenders, and differences from `standard`."""

import math
import statistics
from typing import Any

from benchmarks.race.contenders import MAIN
from benchmarks.race.results import Finals, Results, differences
from benchmarks.race.stages import confirm, transfer
from megatron_mdm.experiments.statistics import mean_interval
from megatron_mdm.pictures import (
    COLORS,
    GREY,
    MARKERS,
    blank_figure,
    legend_below,
    limits,
    point_out,
    save,
    use_steps,
)

_BASELINE = "standard"


def draw(results: Results, path: str) -> None:
    """Draws mean NELBO over steps, and differences from `standard` by seed with their mean.

    Args:
        results: results of any stages; missing ones are left out.
        path: a .png or .svg file.
    """
    with blank_figure() as figure:
        fill(figure, results)
        save(figure, path)


def fill(figure: Any, results: Results) -> None:
    """Draws results into an empty figure; see `draw`."""
    scale = results.scale
    finals = {scale.main.name(): confirm.finals(results)}
    finals |= {shape.name(): transfer.finals(results, shape) for shape in scale.transfer}
    shapes = {title: found for title, x in finals.items() if (found := _differences(x))}
    figure.set_size_inches(5 + 3 * len(shapes), 5)
    ratios = [1.5] + [1] * len(shapes)
    axes = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    _draw_curves(axes[0], results)
    for place, (title, found) in zip(axes[1:], shapes.items(), strict=True):
        place.set_title(title)
        _draw_differences(place, found)


def _draw_curves(axes: Any, results: Results) -> None:
    """Draws the curves from the second evaluation on, where they are close to each other."""
    for name in results.scale.contenders:
        runs = [run for run in confirm.runs(results) if run in results and run.contender == name]
        curves = [
            results[run].nelbo for run in runs if len(results[run].nelbo) == len(run.evaluated)
        ]
        if curves:
            means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            axes.plot(runs[0].evaluated[1:], means[1:], **_look(name), label=name)
    axes.set(ylabel="NELBO (nats per token), mean over seeds", title=results.scale.main.name())
    use_steps(axes)
    if axes.lines:
        legend_below(axes, columns=3)


def _differences(finals: Finals) -> dict[str, list[float]]:
    """Returns each contender's differences from `standard`, by seed, if it has any."""
    base = finals.get(_BASELINE, {})
    return {
        name: found
        for name, values in finals.items()
        if name != _BASELINE and (found := differences(values, base))
    }


def _draw_differences(axes: Any, found: dict[str, list[float]]) -> None:
    means = {name: mean_interval(values) for name, values in found.items()}
    drawn = [x for name, mean in means.items() for x in (*found[name], mean.low, mean.high)]
    axes.set_xlim(limits([*filter(math.isfinite, drawn), 0.0]))
    for place, (name, values) in enumerate(found.items()):
        look = _look(name)
        mean = means[name]
        ys = [0.3 * (0.5 - (i + 0.5) / len(values)) - place for i in range(len(values))]
        axes.plot(values, ys, look["marker"], color=look["color"], alpha=0.6)
        axes.plot([mean.low, mean.high], [-place - 0.3] * 2, color=look["color"], lw=2)
        axes.plot([mean.value], [-place - 0.3], "|", color=look["color"], ms=10, mew=2)
        point_out(axes, values, -place, look["color"], ".3g")
    axes.axvline(0.0, color=GREY, lw=0.8)
    axes.set(xlabel=f"final NELBO minus {_BASELINE}", ylim=(0.5 - len(found), 0.5))
    axes.set_yticks([-place for place in range(len(found))], list(found))


def _look(name: str) -> dict[str, str]:
    place = list(MAIN).index(name)
    return {"color": COLORS[place], "marker": MARKERS[place]}
