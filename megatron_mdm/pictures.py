"""The common style of pictures, and helper functions that several of them use.

The background is white, the colours are the colour-blind safe ones of Okabe and Ito, and ticks have
plain numbers. matplotlib is optional (`files.check_picture`) and is imported when a picture is
drawn.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_mdm.files import complete_or_absent, write_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
YELLOW, SKY = "#e69f00", "#56b4e9"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PALE, GREY = "#c4c4c4", "#777777"
STYLE = {
    "axes.axisbelow": True,
    "axes.formatter.limits": (-9, 9),
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.prop_cycle": f"cycler('color', {list(COLORS)})",
    "axes.titlesize": 11,
    "errorbar.capsize": 2.0,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.color": "#ebebeb",
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.0,
    "savefig.dpi": 110,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


@contextmanager
def blank_figure() -> Iterator["Figure"]:
    """An empty figure in the common style; fill and save it within the block."""
    from matplotlib import style
    from matplotlib.figure import Figure

    # "default" overrides the user's own style, such as a dark one.
    with style.context(["default", STYLE]):
        yield Figure(layout="constrained")


def save(figure: "Figure", path: str) -> None:
    """Writes a figure in the format that the path's suffix names.

    Raises:
        UserError: the file cannot be written.
    """
    with complete_or_absent(path) as (temporary,), write_errors(path):
        figure.savefig(temporary, format=path.rpartition(".")[2].lower())


def legend_below(axes: Any, columns: int = 1, inches: float = 0.45) -> None:
    """Puts the legend below a panel; the layout makes room for it.

    Args:
        axes: the panel.
        columns: number of columns of the legend.
        inches: distance from the lower edge of the panel, which leaves room for the tick labels and
            the axis label.
    """
    from matplotlib.transforms import ScaledTranslation

    down = ScaledTranslation(0, -inches, axes.get_figure(root=True).dpi_scale_trans)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        bbox_transform=axes.transAxes + down,
        borderaxespad=0.0,
        ncols=columns,
    )


def legend_beside(axes: Any) -> None:
    """Puts the legend to the right of a panel."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def use_log_scale(axis: Any) -> None:
    """Makes an axis logarithmic, with plain numbers at 1, 2 and 5; call it after drawing.

    Args:
        axis: `axes.xaxis` or `axes.yaxis`, with positive numbers only.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    if high / low < 5:
        axis.set_major_locator(MaxNLocator(5))
    else:
        axis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 1e3 else (1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    use_plain_numbers(axis)


def use_plain_numbers(axis: Any) -> None:
    """Writes every tick of an axis in full, without a factor or an offset beside the axis."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def use_steps(axes: Any) -> None:
    """Labels the x axis as training steps, with few integer ticks; call it after drawing."""
    from matplotlib.ticker import MaxNLocator

    first, last = axes.dataLim.intervalx
    if first == last:
        axes.set_xlim(first - 0.5, last + 0.5)
    locator = MaxNLocator(5, steps=(1, 2, 5, 10), integer=True, min_n_ticks=1)
    axes.xaxis.set_major_locator(locator)
    axes.set_xlabel("step")


def plain(value: float) -> str:
    """A number as people write it: 20000, 0.0003, 2e-6."""
    digits, _, exponent = f"{value:.4g}".partition("e")
    if exponent and abs(value) < 1:
        return f"{digits}e{int(exponent)}"
    return np.format_float_positional(value, precision=6, fractional=False, trim="-")


def limits(values: Sequence[float], reach: float = 3.0) -> tuple[float, float]:
    """Limits of an axis, chosen without outliers, so that outliers do not compress the rest.

    Args:
        values: finite values, at least one.
        reach: a value is an outlier if it lies more than `reach` interquartile ranges beyond a
            quartile. If the quartiles are equal, there are no outliers.

    Returns:
        The lower and the upper limit, a little beyond the values that are not outliers.
    """
    found = np.asarray(values, dtype=np.float64)
    low, high = np.quantile(found, (0.25, 0.75))
    far = reach * (high - low) if high > low else np.inf
    inner = found[(found >= low - far) & (found <= high + far)]
    margin = 0.06 * (inner.max() - inner.min()) or max(0.05 * abs(inner.max()), 0.5)
    return float(inner.min() - margin), float(inner.max() + margin)


def point_out(axes: Any, values: Sequence[float], y: float, color: str, form: str = ".1f") -> None:
    """Marks values beyond the limits of the x axis: an arrow and the number at the edge.

    Args:
        axes: the panel, with its x limits set.
        values: x values. Values within the limits and NaN are skipped. Several values beyond one
            edge are written as a range, the smallest to the largest.
        y: height of the arrow.
        color: color of the arrow and the number.
        form: format of a number.
    """
    low, high = axes.get_xlim()
    across = axes.get_yaxis_transform()
    for right in (False, True):
        outside = sorted(x for x in values if (x > high if right else x < low))
        beyond = list(dict.fromkeys(f"{x:{form}}" for x in outside))
        if not beyond:
            continue
        edge = (1.0 if right else 0.0, y)
        axes.plot(*edge, ">" if right else "<", color=color, ms=5, transform=across, clip_on=False)
        axes.annotate(
            beyond[0] if len(beyond) == 1 else f"{beyond[0]} to {beyond[-1]}",
            edge,
            xycoords=across,
            xytext=(-6 if right else 6, 0),
            textcoords="offset points",
            ha="right" if right else "left",
            va="center",
            size=7,
            color=color,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
