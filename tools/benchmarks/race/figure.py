"""A picture of results: curves of the contenders, and differences from `standard`."""

import statistics
from typing import Any

from benchmarks.race.contenders import MAIN
from benchmarks.race.results import Finals, Results, differences
from benchmarks.race.stages import confirm, transfer
from megatron_mdm.experiments.statistics import mean_interval
from megatron_mdm.files import complete_or_absent, write_errors

_BASELINE = "standard"


def draw(results: Results, path: str) -> None:
    """Mean NELBO by steps; every seed's difference from `standard`, and the interval of the mean.

    Args:
        results: of any stages; what is missing is left out.
        path: a .png or .svg file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    scale = results.scale
    shapes = {scale.main.name(): confirm.finals(results)}
    shapes |= {shape.name(): transfer.finals(results, shape) for shape in scale.transfer}
    figure, axes = plt.subplots(
        1, 1 + len(shapes), figsize=(4 + 3 * len(shapes), 4), layout="constrained"
    )
    _draw_curves(axes[0], results)
    for place, (title, finals) in zip(axes[1:], shapes.items(), strict=True):
        place.set_title(title, fontsize="medium")
        _draw_differences(place, finals)
    with complete_or_absent(path) as (temporary,), write_errors(path):
        figure.savefig(temporary, dpi=100, format=path.rpartition(".")[2])
    plt.close(figure)


def _draw_curves(axes: Any, results: Results) -> None:
    """From the second evaluation on, after which curves are close to each other."""
    for name in results.scale.contenders:
        runs = [run for run in confirm.runs(results) if run in results and run.contender == name]
        curves = [
            results[run].nelbo for run in runs if len(results[run].nelbo) == len(run.evaluated)
        ]
        if curves:
            means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            axes.plot(runs[0].evaluated[1:], means[1:], "o-", ms=3, color=_color(name), label=name)
    axes.set(xlabel="steps", ylabel="NELBO (nats per token), mean over seeds")
    axes.set_title(results.scale.main.name(), fontsize="medium")
    if axes.lines:
        axes.legend()


def _draw_differences(axes: Any, finals: Finals) -> None:
    names = [name for name in finals if name != _BASELINE]
    for place, name in enumerate(names):
        values = differences(finals[name], finals.get(_BASELINE, {}))
        mean = mean_interval(values)
        axes.plot(values, [-place] * len(values), "o", color=_color(name), ms=4, alpha=0.5)
        axes.plot([mean.low, mean.high], [-place] * 2, color=_color(name), lw=2)
        axes.plot([mean.value], [-place], "|", color=_color(name), ms=16, mew=2)
    axes.axvline(0.0, color="0.6", lw=0.8)
    axes.set(xlabel=f"final NELBO minus {_BASELINE}", yticks=[-i for i in range(len(names))])
    axes.set_yticklabels(names)


def _color(name: str) -> str:
    return f"C{list(MAIN).index(name)}"
