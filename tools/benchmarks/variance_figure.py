"""How much of the gradient's variance each method leaves, as a picture of several results."""

from typing import Any

from megatron_mdm.pictures import COLORS, blank_figure, legend_below, save
from megatron_mdm.recipes import COMBINATIONS
from megatron_mdm.variance.methods import QUIET_BELL

# What a reader calls the methods; a method that has no entry is not drawn.
LABELS = {
    "lattice": "lattice of rates",
    "mirror": "MIRROR",
    "ppots-loss+mirror": "recipe paper: P-POTS on the loss, MIRROR",
    "ppots-loss": "P-POTS on the loss",
    "exact-count": "exact counts",
    "mirror (texts)": "MIRROR, twice the rows",
    "ppots-gradient": "P-POTS on the gradient",
    COMBINATIONS["ppots"]: "recipe ppots",
    "clipped": "recipe clipped",
    "bell": "bell",
    QUIET_BELL: "recipe recommended, before its fade",
}
ROW = 0.42  # inches, of a method


def draw(documents: list[dict[str, Any]], path: str) -> None:
    """Draws bars with their standard errors: a row for each method, a bar for each result.

    Args:
        documents: what `--json` of the benchmark wrote, one for each bar.
        path: a .png or .svg file.
    """
    with blank_figure() as figure:
        fill(figure, documents)
        save(figure, path)


def fill(figure: Any, documents: list[dict[str, Any]]) -> None:
    """Draws results into an empty figure; see `draw`."""
    results = [{row["method"]: row for row in document["rows"]} for document in documents]
    names = [name for name in LABELS if any(name in result for result in results)]
    figure.set_size_inches(8.5, ROW * len(names) + 1.5)
    axes = figure.subplots()
    height = 0.8 / len(results)
    for i, (document, result) in enumerate(zip(documents, results, strict=True)):
        shown = [(place, result[name]) for place, name in enumerate(names) if name in result]
        axes.barh(
            [0.4 - (i + 0.5) * height - place for place, _ in shown],
            [row["gradient_variance_ratio"] for _, row in shown],
            0.92 * height,
            xerr=[row["gradient_variance_ratio_stderr"] for _, row in shown],
            color=COLORS[i % len(COLORS)],
            error_kw={"elinewidth": 1.0},
            label=f"rows of {document['length']} tokens",
        )
    biased = {name for result in results for name in names if not _is_unbiased(result, name)}
    labels = [LABELS[name] + (" *" if name in biased else "") for name in names]
    axes.set_yticks([-place for place in range(len(names))], labels)
    axes.set(ylim=(0.5 - len(names), 0.5), xlabel="relative to standard training")
    axes.axvline(1.0, color="black", lw=0.8)
    axes.grid(axis="y", visible=False)
    star = " (*: another objective)" if biased else ""
    axes.set_title(f"Variance of the gradient of a batch{star}")
    legend_below(axes, columns=len(results))


def _is_unbiased(result: dict[str, Any], name: str) -> bool:
    return name not in result or bool(result[name]["unbiased"])
