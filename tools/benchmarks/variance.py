"""Measures how much each method reduces the gradient variance, on a small model trained here.

The program trains a byte-level model on the source code of Python's standard library with the
standard objective. Then the weights are fixed. Losses and gradients of rows under nested rates and
masks give the shares of masking noise and data noise, and the variance of a batch under each method
relative to `standard` (see tools/variance_report.py). All batches have the same number of rows,
which means equal compute. MIRROR and other methods with several views have a second line at equal
texts, for which they have more rows. The result is for one training run and one kind of text: the
shares of masking noise and data noise depend on the row length and change during training.
"""

import argparse
from typing import Any

from benchmarks import python_text
from benchmarks.drawing import check_drawing, read_results
from megatron_mdm.errors import UserError, check_numbers
from megatron_mdm.experiments.program import program
from megatron_mdm.files import check_output, write_json

DESCRIPTION = "variance of gradient and loss under each method, against standard"
DELIMITERS = tuple(b"\n:()")  # the tokens that ISAD masks more often
SEED = 1234
# What a picture needs of each method.
DRAWN = ("method", "gradient_variance_ratio", "gradient_variance_ratio_stderr", "unbiased")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    parser.add_argument(
        "--report", nargs="+", metavar="FILE", help="draw these results of --json: train nothing"
    )
    parser.add_argument(
        "--figure", metavar="FILE", help="what --report draws: .png or .svg, one bar for each FILE"
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps and rows")
    parser.add_argument("--length", type=int, default=64, help="row length (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps (default: 2000; quick: 600)")
    parser.add_argument(
        "--batch", type=int, default=32, help="rows of a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--positions",
        choices=["learned_absolute", "rope"],
        default="learned_absolute",
        help="position embeddings; with learned ones, training on long rows stays on the plateau "
        "of predictions without context (default: %(default)s)",
    )
    parser.add_argument("--rows", type=int, help="rows measured (default: 400; quick: 100)")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["important"],
        metavar="NAME",
        help="`important`, `all` (every combination), or names of methods (default: important)",
    )


def run(args: argparse.Namespace) -> None:
    """Trains, measures, prints a table, and writes `args.json` if it is set; or draws results.

    Raises:
        UserError: a setting is not possible.
    """
    if args.report or args.figure:
        _draw(args.report, args.figure)
        return

    if args.json:
        check_output(args.json, "--json")

    import torch

    from benchmarks import toy_model
    from megatron_mdm.variance.figure import as_text
    from megatron_mdm.variance.methods import choose
    from megatron_mdm.variance.report import report

    check_numbers(args, "length", least=2)
    check_numbers(args, "steps")
    torch.manual_seed(SEED)
    steps = args.steps or (600 if args.quick else 2000)
    rows = args.rows or (100 if args.quick else 400)
    methods = choose(args.methods, isad=True)
    # Check the settings before the training.
    settings = toy_model.settings(rows, args.batch, methods, SEED, DELIMITERS)
    texts = python_text.rows(args.length, SEED)
    model = toy_model.Model(args.length if args.positions == "learned_absolute" else None)
    trained = toy_model.train(model, texts, args.batch, steps, SEED)
    print(f"length {args.length}, {steps} steps to a loss of {trained:.2f} nats per token")
    print(f"{rows} rows, {settings.rates} rates, {settings.masks} masks; batches of {args.batch}")
    measured = report(*toy_model.measured(model, texts, settings))
    print(as_text(measured))
    results = [
        {
            "method": row["method"],
            "gradient_variance_ratio": row["gradient"][0],
            "gradient_variance_ratio_stderr": row["gradient"][1],
            "loss_variance_ratio": row["loss"][0],
            "loss_variance_ratio_stderr": row["loss"][1],
            "per": row["per"],
            "unbiased": row["unbiased"],
        }
        for row in measured["methods"]
    ]
    if args.json:
        setting = {name: getattr(args, name) for name in ("length", "batch", "positions")}
        parts = {what: measured[what] for what in ("loss", "gradient")}
        document = {**setting, "steps": steps, "loss": trained, "variance": parts}
        document["program"] = program()
        write_json(args.json, {**document, "rows": results})


def _draw(paths: list[str] | None, figure: str | None) -> None:
    """Draws the results of several runs.

    Raises:
        UserError: one of the two flags is missing, or a file cannot be read or drawn.
    """
    figure = check_drawing(paths, figure)
    assert paths is not None  # checked
    from benchmarks import variance_figure

    documents = [_read(path) for path in paths]
    if not any(row["method"] in variance_figure.LABELS for x in documents for row in x["rows"]):
        raise UserError(f"--report {' '.join(paths)}: none of the methods has a bar in the figure")
    variance_figure.draw(documents, figure)


def _read(path: str) -> dict[str, Any]:
    """Reads what --json wrote.

    Raises:
        UserError: it cannot be read, or is something else.
    """

    def needed(document: dict[str, Any]) -> dict[str, Any]:
        _ = [document["length"], *(row[key] for row in document["rows"] for key in DRAWN)]
        return document

    document = read_results(path, "variance", needed)
    if not document["rows"]:
        raise UserError(f"{path}: holds no method")
    return document
