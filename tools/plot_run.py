"""Shows a run: its first and last validation loss, and a picture of what it logged.

    python tools/plot_run.py --tensorboard-dir runs/quickstart/tensorboard --output training.png

The picture has the loss and the loss against the masking rate t. It also has what else was logged:
NELBO of named validation sets, gradient norm, density of the rate, rows per second, masked
fraction, learning rate.
"""

import argparse
import itertools
import os
import re
from functools import partial
from typing import Any

import numpy as np

from megatron_mdm.errors import UserError, escaped, run_tool
from megatron_mdm.experiments.runs import read_scalars
from megatron_mdm.files import check_picture
from megatron_mdm.pictures import (
    BLUE,
    COLORS,
    GREY,
    MARKERS,
    ORANGE,
    PALE,
    blank_figure,
    legend_below,
    save,
    use_log_scale,
    use_plain_numbers,
    use_steps,
)

# Steps and the values that were logged at them, float64 [n] each.
Series = tuple[np.ndarray, np.ndarray]
LOSS, GRADIENT, NELBO = "mdm loss", "grad-norm", "mdm/validation NELBO"
SET = re.compile(r"mdm/validation (.+) NELBO")  # of a named set
BIN = re.compile(r"mdm/validation loss at t ([\d.]+)-([\d.]+)")
DENSITY = re.compile(r"mdm/density at t ([\d.]+)")
# Panels with one curve: name in the logs, title, label of the y axis.
SINGLE = (
    ("mdm/uniform share", "Density of the rate", "share of the uniform density"),
    ("mdm/rows per s", "Throughput", "rows per second"),
    ("mdm/masked fraction", "Masking", "masked fraction of the tokens"),
    ("learning-rate", "Learning rate", "learning rate"),
)
MOST_DENSITIES = 5  # the largest number of refits that are drawn


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tensorboard-dir", required=True, help="--tensorboard-dir of the run")
    parser.add_argument("--output", required=True, help="picture to write: PNG, SVG or PDF")
    return parser.parse_args()


def main() -> None:
    """Reads, prints, draws."""
    options = parse()
    check_picture(options.output, "--output", (".png", ".svg", ".pdf"))
    if not os.path.isdir(options.tensorboard_dir):
        raise UserError(f"--tensorboard-dir {options.tensorboard_dir}: no such directory")
    try:
        scalars = read_scalars(options.tensorboard_dir)
    except OSError as error:
        raise UserError(
            f"--tensorboard-dir {options.tensorboard_dir} cannot be read: {error.strerror} "
            f"({os.fsdecode(error.filename or '')})"
        ) from error
    if NELBO not in scalars:
        raise UserError(
            f"--tensorboard-dir {options.tensorboard_dir} has no run of megatron_mdm with a "
            "validation: give the directory that the run named as --tensorboard-dir"
        )
    series = {name: in_order(values) for name, values in scalars.items()}
    steps, values = series[NELBO]
    errors = at(series[f"{NELBO} stderr"], steps)
    for step in shown_validations(steps):
        value, stderr = values[steps == step][0], errors[steps == step][0]
        when = "before" if step == 0 else "after" if step == steps[-1] else "first"
        print(
            f"validation NELBO {when:6s} ({counted(step)}): {value:.3f} +- {stderr:.3f} nats/token"
        )
    if LOSS not in series:
        raise UserError(
            f"--tensorboard-dir {options.tensorboard_dir} holds a validation and no training: "
            "there is nothing to draw yet"
        )
    with blank_figure() as figure:
        draw(figure, series)
        save(figure, options.output)
    print(f"picture: {escaped(options.output)}")


def in_order(values: list[tuple[int, float]]) -> Series:
    """Each step once, in order; of two values for a step, the later one.

    Megatron logs the last validation twice, and a resumed run logs the steps after its checkpoint
    again. NaN and infinity become NaN, which is a gap in the curve.
    """
    steps, found = np.array(sorted(dict(values).items()), dtype=np.float64).T
    return steps, np.where(np.isfinite(found), found, np.nan)


def at(series: Series, steps: np.ndarray) -> np.ndarray:
    """The values at given steps, NaN where nothing was logged."""
    known = dict(zip(*(x.tolist() for x in series), strict=True))
    return np.array([known.get(step, np.nan) for step in steps.tolist()])


def shown_validations(steps: np.ndarray) -> list[float]:
    """The steps of the first and of the last validation."""
    return sorted({float(steps[0]), float(steps[-1])})


def when(step: float) -> str:
    """A label for a measurement at a step; step 0 is before training."""
    return f"after {counted(step)}" if step else "before training"


def counted(steps: float) -> str:
    """A number of steps in words."""
    return f"{steps:.0f} step" + ("" if steps == 1 else "s")


def draw(figure: Any, series: dict[str, Series]) -> None:
    """Fills a figure with one panel for each quantity that was logged."""
    densities = sorted(
        (float(match[1]), values)
        for name, values in series.items()
        if (match := DENSITY.fullmatch(name))
    )
    sets = sorted(match[1] for name in series if (match := SET.fullmatch(name)))
    fillers = [partial(_draw_loss, series=series, sets=sets)]
    if sets:
        fillers.append(partial(_draw_sets, series=series, sets=sets))
    fillers.append(partial(_draw_bins, series=series))
    if GRADIENT in series and (series[GRADIENT][1] > 0).any():  # its axis is logarithmic
        fillers.append(partial(_draw_gradient, series=series))
    if densities:
        fillers.append(partial(_draw_densities, densities=densities))
    fillers += [
        partial(_draw_single, series=series[name], title=title, what=what)
        for name, title, what in SINGLE
        if name in series
    ]
    count = len(fillers)
    columns = 3 if count % 3 == 0 or count < 7 else 4
    rows = -(-count // columns)
    figure.set_size_inches(4.3 * columns, 3.8 * rows + 0.15 * len(sets))  # for their legend
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in panels[count:]:
        unused.remove()
    for fill, axes in zip(fillers, panels, strict=False):
        fill(axes)


def _draw_loss(axes: Any, series: dict[str, Series], sets: list[str]) -> None:
    """The training loss, and every validation with its error bar."""
    bound = series.get("mdm/is bound")
    always = bound is None or np.nanmin(bound[1]) == 1.0
    label = "training" if always else "training (not always a bound)"
    _draw_training(axes, series[LOSS], label)
    label = "validation, mean of its sets" if sets else "validation"
    _draw_validation(axes, series, NELBO, "o", color=ORANGE, label=f"{label} +- standard error")
    axes.set(ylabel="loss (nats/token)", title="Loss")
    use_steps(axes)
    legend_below(axes)


def _draw_sets(axes: Any, series: dict[str, Series], sets: list[str]) -> None:
    """Every validation of each named set, and the mean over the sets."""
    _draw_validation(axes, series, NELBO, "o-", color=ORANGE, label="mean of the sets")
    looks = zip(itertools.cycle(COLORS[2:]), itertools.cycle(MARKERS[1:]), strict=False)
    for name, (color, marker) in zip(sets, looks, strict=False):
        # matplotlib leaves out labels that begin with "_". The name of a set may begin so.
        look = {"color": color, "label": f"set {name}", "lw": 0.8}
        _draw_validation(axes, series, f"mdm/validation {name} NELBO", f"{marker}-", **look)
    axes.set(ylabel="NELBO (nats/token)", title="Validation sets +- standard error")
    use_steps(axes)
    short = max(map(len, sets)) <= 16  # two columns of longer names are wider than the panel
    legend_below(axes, columns=2 if short and len(sets) > 2 else 1)


def _draw_validation(
    axes: Any, series: dict[str, Series], name: str, form: str, **look: Any
) -> None:
    """The NELBO of each validation with its error bar."""
    steps, values = series[name]
    errors = at(series[f"{name} stderr"], steps)
    axes.errorbar(steps, values, errors, fmt=form, elinewidth=1.0, zorder=3, **look)


def _draw_bins(axes: Any, series: dict[str, Series]) -> None:
    """The loss of the first and of the last validation against t."""
    bins = sorted(
        ((float(match[1]) + float(match[2])) / 2, values)
        for name, values in series.items()
        if (match := BIN.fullmatch(name))
    )
    steps = shown_validations(series[NELBO][0])
    looks = [(GREY, "s"), (ORANGE, "o")][-len(steps) :]
    for step, (color, marker) in zip(steps, looks, strict=True):
        losses = [at(values, np.array([step]))[0] for _, values in bins]
        axes.plot([t for t, _ in bins], losses, f"{marker}-", color=color, label=when(step))
    axes.set(xlabel="masking rate t", ylabel="validation loss (nats/token)", title="Loss against t")
    axes.set(xlim=(0, 1))
    legend_below(axes)


def _draw_training(axes: Any, series: Series, label: str) -> None:
    """The value of every logged step, pale, and its mean over many steps."""
    steps, values = series
    window = len(values) // 16 | 1
    axes.plot(steps, values, _style(values), color=PALE, lw=0.7, label=f"{label}, each logged step")
    if window > 1:
        middle = window // 2
        label = f"mean of {window} logged steps, at the middle one"
        inner, means = steps[middle : len(steps) - middle], centred_mean(values, window)
        axes.plot(inner, means, color=BLUE, label=label)


def _draw_gradient(axes: Any, series: dict[str, Series]) -> None:
    """The norm of the gradient."""
    _draw_training(axes, series[GRADIENT], "gradient before clipping")
    axes.set(ylabel="norm of the gradient", title="Gradient")
    use_log_scale(axes.yaxis)
    use_steps(axes)
    legend_below(axes)


def _draw_single(axes: Any, series: Series, title: str, what: str) -> None:
    """One curve."""
    steps, values = series
    axes.plot(steps, values, _style(values), lw=1.4 if len(values) < 200 else 0.8)
    axes.set(ylabel=what, title=title)
    use_plain_numbers(axes.yaxis)
    use_steps(axes)


def _style(values: np.ndarray) -> str:
    """A line, with markers if it has few points."""
    return "o-" if len(values) < 30 else "-"


def _draw_densities(axes: Any, densities: list[tuple[float, Series]]) -> None:
    """The density of the rate after some of the refits; earlier ones are paler."""
    from matplotlib import colormaps

    steps = densities[0][1][0]
    places = np.unique(np.linspace(0, len(steps) - 1, MOST_DENSITIES).round().astype(int))
    shades = colormaps["viridis_r"](np.linspace(0.15, 1.0, len(places)))
    for place, color, marker in zip(places, shades, MARKERS, strict=False):
        values = [at(values, steps[place : place + 1])[0] for _, values in densities]
        label = when(steps[place])
        axes.plot([t for t, _ in densities], values, f"{marker}-", color=color, label=label)
    axes.set(xlabel="masking rate t", ylabel="density of t", title="Density of the rate")
    axes.set(xlim=(0, 1))
    legend_below(axes, columns=2)


def centred_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of every window of values, without NaN; it belongs to the middle of the window.

    Args:
        values: [n], n at least the window.
        window: number of values of a window, odd.

    Returns:
        [n - window + 1]; NaN where all values of a window are NaN.
    """
    known = ~np.isnan(values)
    sums, counts = (
        np.convolve(x, np.ones(window), "valid") for x in (np.where(known, values, 0.0), known)
    )
    means: np.ndarray = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0.5)
    return means


if __name__ == "__main__":
    run_tool(main)
