"""Shows a variance report (report.py) as a table and as a picture."""

import math
from typing import Any

from megatron_mdm.pictures import (
    BLUE,
    GREEN,
    ORANGE,
    PALE,
    SKY,
    blank_figure,
    legend_beside,
    limits,
    point_out,
    save,
    use_plain_numbers,
)

NAMES = ("loss", "gradient")
COLUMNS = ("gradient", "loss")  # columns of the table of methods
PARTS = {"A": BLUE, "B": ORANGE, "C": GREEN}  # part of the variance -> colour
NOTES = (
    "* another objective: its loss and gradient are not those of standard",
    "ppots-gradient: fitted to the gradient's norm at the final hidden states, as in training",
    "ema: the controlled loss of the logs; training is that of standard",
)


def as_text(report: dict[str, Any]) -> str:
    """Formats a report as a table."""
    settings = report["settings"]
    lines = []
    if settings["block_size"] is not None:
        unit = settings["rate_per"]
        lines = [f"blocks of {settings['block_size']} tokens, a rate for each {unit}"]
    lines += [f"{'variance of one row':24s}" + "".join(f"{name:>28s}" for name in NAMES)]
    for part, meaning in (("A", "mask pattern"), ("B", "rate"), ("C", "data"), ("total", "")):
        lines.append(f"{part:6s}{meaning:18s}{_parts(report, report, part)}")
    rows, documents = settings["rows"], report["documents"]
    if documents < rows:
        lines.append(
            f"WARNING: the {rows} rows are from {documents} documents. The error bars assume "
            "independent rows: they and C are too small if rows of one document are similar"
        )
    causal = report.get("autoregressive")
    if causal:
        loss, error = causal["mean loss"]
        known = causal["unigram entropy"]
        lines.append(f"{'C     autoregressive':24s}{_parts(report, causal, 'C')}")
        lines.append(
            f"      its next-token loss: {loss:.3f} +- {error:.2g} nats; unigram entropy of the "
            f"tokens: {known:.3f}"
        )
        if loss > known:
            lines.append(
                "      WARNING: this network does not predict next tokens, so its C is not that of "
                "an autoregressive model: give one with --autoregressive"
            )
    if report["methods"]:
        lines += ["", *_method_lines(report["methods"]), *NOTES]
    return "\n".join(lines)


def _parts(report: dict[str, Any], source: dict[str, Any], part: str) -> str:
    """Formats value, error and share of the total, for the loss and the gradient.

    Args:
        report: the report, for the total.
        source: where A, B and C are: the report, or its `autoregressive` part.
        part: A, B, C or total.
    """
    cells = ""
    for name in NAMES:
        value, error = source[name][part]
        share = value / report[name]["total"][0]
        cells += f"{value:12.4g} +- {error:<8.2g} {share:4.0%}"
    return cells


def _method_lines(rows: list[dict[str, Any]]) -> list[str]:
    width = max(len(row["method"]) for row in rows) + 3
    lines = [
        f"{'variance / standard':{width}s}{'per':5s}{'gradient':>17s}{'loss':>17s}"
        f"{'rows':>6s}{'texts':>6s}{'masked':>7s}{'head tokens':>12s}"
    ]
    for row in rows:
        cells = "".join("{:8.3f} +- {:.3f}".format(*row[name]) for name in COLUMNS)
        name = row["method"] + ("" if row["unbiased"] else " *")
        lines.append(
            f"{name:{width}s}{row['per']:5s}{cells}{row['rows']:6d}{row['texts']:6d}"
            f"{row['masked_fraction']:7.0%}{row['head_tokens']:12.0f}"
        )
    return lines


def draw_figure(report: dict[str, Any], path: str) -> None:
    """Draws bars of A, B and C, their curves over t, and the methods; PNG or SVG by the suffix."""
    with blank_figure() as figure:
        fill(figure, report)
        save(figure, path)


def fill(figure: Any, report: dict[str, Any]) -> None:
    """Draws a report into an empty figure, with the methods in the order of the table."""
    methods = report["methods"]
    # Sizes in inches, so that the panels on the left do not grow with the number of methods.
    left, line = 3.6, 0.28
    heights = [left, left]
    if (rest := line * len(methods) + 1.0 - 2 * left) > 0:
        heights.append(rest)
    figure.set_size_inches(13.0 if methods else 6.5, sum(heights))
    grid = figure.add_gridspec(len(heights), 2 if methods else 1, height_ratios=heights)
    _draw_shares(figure.add_subplot(grid[0, 0]), report)
    if report["curves"]:
        _draw_curves(figure.add_subplot(grid[1, 0]), report)
    if methods:
        _draw_methods(figure.add_subplot(grid[:, 1]), methods)


def _draw_shares(axes: Any, report: dict[str, Any]) -> None:
    bars = [
        ("A: mask pattern", "A", report, PARTS["A"]),
        ("B: rate", "B", report, PARTS["B"]),
        ("C: data", "C", report, PARTS["C"]),
        ("C, autoregressive", "C", report.get("autoregressive"), PALE),
    ]
    for i, (label, part, source, color) in enumerate(bars):
        if source is None:
            continue
        values, errors = (
            [source[n][part][k] / report[n]["total"][0] for n in NAMES] for k in (0, 1)
        )
        places = [x + 0.21 * (i - 1.5) for x in range(2)]
        top = math.inf
        # The scale is set by A, B and C. A taller autoregressive bar is cut off.
        if source is not report:
            top = axes.get_ylim()[1]
            axes.set_ylim(top=top)
        # A cut bar shows its value in place of the error bar.
        errors = [math.nan if v > top else e for v, e in zip(values, errors, strict=True)]
        axes.bar(places, values, 0.19, yerr=errors, label=label, color=color)
        for place, value in zip(places, values, strict=True):
            if value > top:
                axes.annotate(f"↑\n{value:.3g}", (place, top), size=7, ha="center", va="top")
    axes.set(xticks=range(2), xticklabels=NAMES, ylabel="share of the variance of one row")
    axes.set(title="Where the variance comes from")
    legend_beside(axes)


def _draw_curves(axes: Any, report: dict[str, Any]) -> None:
    from matplotlib.ticker import SymmetricalLogLocator

    bins = report["settings"]["bins"]
    for name, style, fill in zip(NAMES, ("--", "-"), ("none", "full"), strict=True):
        total = report[name]["total"][0]
        for part, marker in (("A", "o"), ("B", "s")):
            points = [
                ((i + 0.5) / bins, point[0] / total, point[1] / total)
                for i, point in enumerate(report["curves"][f"{name} {part}"])
                if point is not None
            ]
            if points:
                axes.errorbar(
                    *zip(*points, strict=True),
                    fmt=f"{marker}{style}",
                    fillstyle=fill,
                    label=f"{part}(t), {name}",
                    color=PARTS[part],
                )
    axes.set(xlabel="masking rate t", ylabel="relative to the total", xlim=(0, 1))
    axes.set(title="At each masking rate")
    # Estimates near 0 can be negative, so the scale is linear near 0 and logarithmic beyond.
    axes.set_yscale("symlog", linthresh=0.1)
    axes.margins(y=0.08)
    axes.yaxis.set_major_locator(
        SymmetricalLogLocator(base=10, linthresh=0.1, subs=(1.0, 2.0, 5.0))
    )
    use_plain_numbers(axes.yaxis)
    legend_beside(axes)


def _draw_methods(axes: Any, rows: list[dict[str, Any]]) -> None:
    ends = [value + error for row in rows for value, error in (row[name] for name in COLUMNS)]
    most = max(1.05, limits([*ends, 1.0])[1])
    for i, (name, color) in enumerate(zip(COLUMNS, (BLUE, SKY), strict=True)):
        values, errors = ([row[name][k] for row in rows] for k in (0, 1))
        places = [-y - 0.36 * (i - 0.5) for y in range(len(rows))]
        axes.barh(places, values, 0.34, xerr=errors, label=name, color=color)
        axes.set(xlim=(0.0, most), ylim=(-len(rows) + 0.4, 0.6))
        for value, place in zip(values, places, strict=True):
            point_out(axes, [value], place, "black", ".3g")
    labels = [row["method"] + ("" if row["unbiased"] else " *") for row in rows]
    axes.set_yticks([-y for y in range(len(rows))], labels)
    axes.set(title="Methods (*: another objective)", xlabel="variance relative to standard")
    axes.axvline(1.0, color="black", lw=0.8)
    axes.grid(axis="y", visible=False)
    legend_beside(axes)
