"""Measures where the noise of training comes from, and what each method leaves of it.

    python tools/variance_report.py --load checkpoints --data my_text --output variance.json

writes variance.json and variance.png, and prints the table. Nested draws of rows, rates and masks
give the shares of the masking pattern (A), the masking rate (B) and the data (C) in the variance of
the loss and of the gradient of one row, beside the data noise of the same network on the same rows
as an autoregressive model: causal mask, next tokens. Then batches are drawn under every method.
The estimates are unbiased, so that a small B or C can come out negative: see the error bars.
Interrupted, it keeps what was measured in variance.json.partial, and the same command goes on.
Under torchrun the ranks share the model as tensor-parallel ranks.
"""

import argparse
import os
from pathlib import Path

from megatron_mdm.checkpoint import add_checkpoint_arguments, open_checkpoint
from megatron_mdm.errors import UserError, run_tool
from megatron_mdm.pretrain import prepare_environment

MOST_WHOLE = 1_000_000  # parameters up to which gradients are kept whole
SKETCH = 65_536


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_arguments(parser, pipeline=False)
    parser.add_argument("--data", required=True, help="text or JSONL file, or .bin/.idx prefix")
    parser.add_argument("--output", required=True, metavar="X.json", help="file to write")
    parser.add_argument(
        "--figure", metavar="FILE", help="PNG or SVG to write (default: X.png beside --output)"
    )
    for name, default, meaning in (
        ("--rows", 100, "rows of the nested draws; more tighten the error bars"),
        ("--rates", 4, "rates of each row"),
        ("--masks", 2, "masks at each rate"),
        ("--batches", 100, "batches of each method; 0 leaves the methods out"),
        ("--batch", 32, "rows of a batch"),
        ("--bins", 10, "bins of t in the curves"),
        ("--micro-batch", 8, "rows in one call of the model"),
        ("--seed", 0, "of texts, rates and masks"),
    ):
        parser.add_argument(
            name, type=int, default=default, metavar="N", help=f"{meaning} (default: {default})"
        )
    parser.add_argument(
        "--parameters", default="", metavar="TEXT", help="only parameters with this in their name"
    )
    parser.add_argument(
        "--sketch",
        type=int,
        metavar="D",
        help="project gradients at random on D numbers, which keeps variances in the mean "
        f"(default: {SKETCH} above {MOST_WHOLE:,} parameters, else none)",
    )
    parser.add_argument("--json-key", default="text", metavar="KEY", help="(default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Measures, prints, writes, draws."""
    options = parse()
    if not options.output.endswith(".json"):
        raise UserError(f"--output {options.output}: must end in .json")
    figure = options.figure or options.output.removesuffix(".json") + ".png"
    if not figure.endswith((".png", ".svg")):
        raise UserError(f"--figure {figure}: must end in .png or .svg")
    if min(options.bins, options.micro_batch) < 1 or (options.sketch or 1) < 1:
        raise UserError("--bins, --micro-batch and --sketch must be at least 1")
    prepare_environment(options.device)

    import json

    import torch
    from tqdm import tqdm

    from megatron_mdm import variance_report as report
    from megatron_mdm.data.outputs import termination_raises, write_text

    names = ("rows", "rates", "masks", "batches", "batch", "bins", "seed")
    numbers = {name: getattr(options, name) for name in names}
    report.Settings(**numbers, mask_token_id=0, eps=0.5, subject="")  # complain before loading
    with open_checkpoint(options.load, options.device) as loaded:
        from megatron_mdm.mcore.measure import ParallelSketch, causal_step, gradient_step
        from megatron_mdm.mcore.texts import read_tokens, rows_of

        args = loaded.args
        pool = 20 * options.rows
        documents = read_tokens(loaded, options.data, options.json_key, pool * args.seq_length)
        rows = rows_of(loaded, documents, packed=True, limit=pool)
        rows = [row for row in rows if len(row.tokens) == args.seq_length]  # all but the last
        if not rows:
            raise UserError(f"{options.data} is shorter than one row of {args.seq_length} tokens")
        order = torch.randperm(
            len(rows), generator=torch.Generator().manual_seed(options.seed)
        ).tolist()
        texts = torch.stack([rows[i].tokens for i in order])
        eligible = torch.stack([rows[i].eligible for i in order])
        if (texts == loaded.mask_token_id).any():
            raise UserError(f"{options.data} contains the mask token: tokenize it again without")

        parameters = [
            p for name, p in loaded.model.named_parameters() if options.parameters in name
        ]
        if not parameters:
            raise UserError(f"--parameters {options.parameters}: no parameter has that in its name")
        sketch = ParallelSketch(parameters, None, options.seed)
        count = sketch.count
        size = options.sketch or (SKETCH if count > MOST_WHOLE else None)
        if size is not None:
            sketch = ParallelSketch(parameters, size, options.seed)
        step = gradient_step(loaded, sketch, options.micro_batch)
        causal = causal_step(loaded, sketch, options.micro_batch)
        iteration = Path(options.load, "latest_checkpointed_iteration.txt").read_text().strip()
        subject = [os.path.realpath(options.load), iteration, os.path.realpath(options.data)]
        settings = report.Settings(
            **numbers,
            mask_token_id=loaded.mask_token_id,
            eps=args.mdm_eps,
            subject=" ".join(
                map(str, [*subject, options.parameters, count, size, args.world_size])
            ),
        )
        first = args.rank == 0
        state = report.State(options.output + ".partial", settings, writes=first)
        with (
            termination_raises(),
            tqdm(unit="rows", total=settings.work, disable=not first) as bar,
        ):
            result = report.measure(step, texts, eligible, settings, state, bar.update, causal)
        if first:
            print(report.as_text(result))
            report.draw_figure(result, figure)
            write_text(options.output, json.dumps(result, indent=2) + "\n")
            os.unlink(state.path)


if __name__ == "__main__":
    run_tool(main)
