"""A report of the variance (report.py) as a table and as a picture."""

from typing import Any

from megatron_mdm.files import complete_or_absent, write_errors

NAMES = ("loss", "gradient")
NOTES = (
    "* another objective, whose loss and gradient are not those of standard",
    "ppots-gradient: the norm of the gradient at the final hidden states, as in training",
    "ema: the controlled loss of the logs; training is that of standard",
)


def as_text(report: dict[str, Any]) -> str:
    """The report as a table."""
    lines = [f"{'variance of one row':24s}" + "".join(f"{name:>28s}" for name in NAMES)]
    for part, meaning in (("A", "mask pattern"), ("B", "rate"), ("C", "data"), ("total", "")):
        lines.append(f"{part:6s}{meaning:18s}{_parts(report, report, part)}")
    rows, documents = report["settings"]["rows"], report["documents"]
    if documents < rows:
        lines.append(
            f"WARNING: the {rows} rows are from {documents} documents. The error bars take rows "
            "for independent: they and C are too small where rows of one document are akin"
        )
    causal = report.get("autoregressive")
    if causal:
        loss, error = causal["mean loss"]
        known = causal["unigram entropy"]
        lines.append(f"{'C     autoregressive':24s}{_parts(report, causal, 'C')}")
        lines.append(
            f"      its next-token loss: {loss:.3f} +- {error:.2g} nats; entropy of the tokens one "
            f"by one: {known:.3f}"
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
    """Value, error and share of the total, of the loss and of the gradient."""
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
        cells = "".join("{:8.3f} +- {:.3f}".format(*row[name]) for name in ("gradient", "loss"))
        name = row["method"] + ("" if row["unbiased"] else " *")
        lines.append(
            f"{name:{width}s}{row['per']:5s}{cells}{row['rows']:6d}{row['texts']:6d}"
            f"{row['masked_fraction']:7.0%}{row['head_tokens']:12.0f}"
        )
    return lines


def draw_figure(report: dict[str, Any], path: str) -> None:
    """Bars of A, B and C, their curves over t, and the methods; PNG or SVG by the suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = {"A": "C0", "B": "C1", "C": "C2"}
    height = max(4.0, 0.26 * len(report["methods"]))
    figure, (shares, curves, methods) = plt.subplots(
        1, 3, figsize=(13, height), layout="constrained", width_ratios=[1, 1.6, 1.6]
    )
    bars = [
        ("A: mask pattern", "A", report),
        ("B: rate", "B", report),
        ("C: data", "C", report),
        ("C, autoregressive", "C", report.get("autoregressive")),
    ]
    for i, (label, part, source) in enumerate(bars):
        if source is None:
            continue
        values, errors = (
            [source[n][part][k] / report[n]["total"][0] for n in NAMES] for k in (0, 1)
        )
        places = [x + 0.21 * (i - 1.5) for x in range(2)]
        color = colors[part] if source is report else "0.6"
        shares.bar(places, values, 0.19, yerr=errors, capsize=3, label=label, color=color)
    shares.set(xticks=range(2), xticklabels=NAMES, ylabel="share of the variance of one row")
    shares.legend()
    bins = report["settings"]["bins"]
    for name, style in zip(NAMES, ("--", "-"), strict=True):
        total = report[name]["total"][0]
        for part in ("A", "B"):
            points = [
                ((i + 0.5) / bins, point[0] / total, point[1] / total)
                for i, point in enumerate(report["curves"][f"{name} {part}"])
                if point is not None
            ]
            if points:
                x, y, e = zip(*points, strict=True)
                label = f"{part}(t), {name}"
                curves.errorbar(x, y, e, fmt=f"o{style}", ms=3, label=label, color=colors[part])
    curves.set(xlabel="masking rate t", ylabel="relative to the total", xlim=(0, 1))
    curves.set_yscale("symlog", linthresh=0.1)
    curves.legend()
    rows = report["methods"][::-1]
    for i, name in enumerate(NAMES[::-1]):
        values, errors = ([row[name][k] for row in rows] for k in (0, 1))
        places = [y + 0.36 * (i - 0.5) for y in range(len(rows))]
        methods.barh(places, values, 0.34, xerr=errors, label=name, color=f"C{4 - i}")
    labels = [row["method"] + ("" if row["unbiased"] else " *") for row in rows]
    methods.set(yticks=range(len(rows)), yticklabels=labels)
    methods.set(xlabel="variance relative to standard (*: another objective)")
    methods.axvline(1.0, color="k", lw=0.8)
    if rows:
        methods.legend(loc="lower right")
    with complete_or_absent(path) as (temporary,), write_errors(path):
        figure.savefig(temporary, dpi=150, format=path.rpartition(".")[2])
    plt.close(figure)
