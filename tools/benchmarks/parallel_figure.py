"""Exact match against tokens per forward pass, as a picture with a line for each block size."""

from typing import Any

from megatron_mdm.pictures import COLORS, MARKERS, blank_figure, legend_beside, save

# What a picture needs of each result.
DRAWN = ("block_size", "threshold", "tokens_per_pass", "exact_match", "exact_match_stderr")


def draw(points: list[dict[str, Any]], path: str) -> None:
    """Draws results.

    Args:
        points: the `rows` that `--json` of the benchmark wrote.
        path: a .png or .svg file.
    """
    with blank_figure() as figure:
        fill(figure, points)
        save(figure, path)


def fill(figure: Any, points: list[dict[str, Any]]) -> None:
    """Draws results into an empty figure; see `draw`."""
    figure.set_size_inches(8.0, 4.2)
    axes = figure.subplots()
    sizes = list(dict.fromkeys(point["block_size"] for point in points))
    for i, size in enumerate(sizes):
        own = [point for point in points if point["block_size"] == size]
        own.sort(key=lambda point: point["tokens_per_pass"])
        axes.errorbar(
            [point["tokens_per_pass"] for point in own],
            [100 * point["exact_match"] for point in own],
            yerr=[100 * point["exact_match_stderr"] for point in own],
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            elinewidth=1.0,
            label="whole rows" if size == "row" else f"blocks of {size}",
        )
        for point in own:
            if point["threshold"] is not None:
                axes.annotate(
                    f"{point['threshold']:g}",
                    (point["tokens_per_pass"], 100 * point["exact_match"]),
                    xytext=(4, 4),
                    textcoords="offset points",
                    size=7,
                    color=COLORS[i % len(COLORS)],
                )
    axes.set(xlabel="tokens per forward pass", ylabel="exact match, %")
    axes.set_title("Parallel decoding; numbers are thresholds")
    legend_beside(axes)
