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

from benchmarks import python_text
from megatron_mdm.errors import check_numbers
from megatron_mdm.files import write_json

DESCRIPTION = "variance of gradient and loss under each method, against standard"
DELIMITERS = tuple(b"\n:()")  # the tokens that ISAD masks more often
SEED = 1234


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
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
    """Trains, measures, prints a table, and writes `args.json` if it is set.

    Raises:
        UserError: a setting is not possible.
    """
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
        write_json(args.json, {**document, "rows": results})
