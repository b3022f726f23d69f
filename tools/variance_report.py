"""Measures where the noise of training comes from, and what each method leaves of it.

    python tools/variance_report.py --load checkpoints --data my_text --output variance.json

writes variance.json and variance.png, and prints the table. --data is text, or prompts and
responses (.bin/.idx), of which only the responses are masked; rows are drawn from all over it.
Nested draws of rows, rates and masks give the shares of the masking pattern (A), the masking rate
(B) and the data (C) in the variance of the loss and of the gradient of one row, beside the data
noise of the same network on the same rows as an autoregressive model: causal mask, next tokens. For
that give the weights of one that was trained so (--autoregressive); a diffusion model's own predict
no next tokens. Other masks of the same rows give the table of the methods; for some of them:

    python tools/variance_report.py ... --methods mirror 4-views ppots-gradient+lattice+exact-count

The estimates are unbiased, so that a small B or C can come out negative: see the error bars.
Interrupted, it keeps what was measured in variance.json.partial, and the same command goes on.
Under torchrun the ranks share the model as tensor-parallel ranks.
"""

import argparse
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mdm.checkpoint import add_checkpoint_arguments, open_asked_for
from megatron_mdm.data.documents import add_format_argument
from megatron_mdm.environment import prepare_environment
from megatron_mdm.errors import UserError, run_tool
from megatron_mdm.files import check_picture, termination_raises, write_json

if TYPE_CHECKING:
    from megatron_mdm.evaluation.nelbo import ScoredRow
    from megatron_mdm.mcore.inference.loaded_model import LoadedModel
    from megatron_mdm.mcore.inference.measure import ParallelSketch


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
        ("--rows", 200, "rows of the nested draws; more tighten the error bars"),
        ("--rates", 4, "rates of each row"),
        ("--masks", 2, "masks at each rate"),
        ("--batch", 32, "rows of a batch in the table of the methods"),
        ("--bins", 10, "bins of t in the curves"),
        ("--seed", 0, "of texts, rates and masks"),
    ):
        parser.add_argument(
            name, type=int, default=default, metavar="N", help=f"{meaning} (default: {default})"
        )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["important"],
        metavar="NAME",
        help="rows of the table: `important`, `all` (every combination), `none`, or names out of "
        "these (default: important)",
    )
    parser.add_argument(
        "--isad-token-ids",
        type=int,
        nargs="+",
        metavar="ID",
        help="tokens that ISAD masks more often (default: those of the checkpoint's run; without "
        "any, ISAD is left out)",
    )
    parser.add_argument(
        "--autoregressive",
        metavar="CHECKPOINT",
        help="the same network trained on next tokens (-m megatron_mdm.experiments.autoregressive)",
    )
    parser.add_argument(
        "--parameters", default="", metavar="TEXT", help="only parameters with this in their name"
    )
    parser.add_argument(
        "--sketch",
        type=int,
        metavar="D",
        help="project gradients of more parameters at random on D numbers, which keeps variances "
        "in the mean (default: 8192)",
    )
    add_format_argument(parser, "of --data, if it is a file")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="(default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Measures, prints, writes, draws."""
    options = parse()
    if not options.output.endswith(".json"):
        raise UserError(f"--output {options.output}: must end in .json")
    figure = options.figure or options.output.removesuffix(".json") + ".png"
    check_picture(figure, "--figure")
    if options.sketch is not None and options.sketch < 1:
        raise UserError("--sketch must be at least 1")
    prepare_environment(options.device)

    from tqdm import tqdm

    from megatron_mdm.variance import figure as variance_figure
    from megatron_mdm.variance import report as variance_report
    from megatron_mdm.variance.methods import choose
    from megatron_mdm.variance.state import State

    names = ("rows", "rates", "masks", "batch", "bins", "seed")
    numbers = {name: getattr(options, name) for name in names}
    # Complain before loading.
    methods = choose(options.methods, isad=True)
    variance_report.Settings(
        **numbers, methods=methods, isad_token_ids=(0,), mask_token_id=0, eps=0.5
    )
    with open_asked_for(options) as loaded:
        from megatron_mdm.mcore.inference.loaded_model import load_other_weights
        from megatron_mdm.mcore.inference.measure import causal_step, gradient_step

        args = loaded.args
        texts = read_rows(loaded, options)
        sketch = sketch_of(loaded, options)
        step = gradient_step(loaded, sketch)
        causal_model = loaded
        if options.autoregressive:
            causal_model = load_other_weights(loaded, options.autoregressive)
            sketch = sketch_of(causal_model, options)
        causal = causal_step(causal_model, sketch)
        # Which rows these are: what was measured on others does not go on.
        drawn = hashlib.blake2b(digest_size=8)
        for text in texts[: options.rows]:
            drawn.update(text.tokens.numpy().tobytes())
        isad = tuple(options.isad_token_ids or args.mdm_isad_token_ids or ())
        settings = variance_report.Settings(
            **numbers,
            methods=choose(options.methods, isad=bool(isad)),
            mask_token_id=loaded.mask_token_id,
            eps=args.mdm_eps,
            isad_token_ids=isad,
            subject=" ".join(
                map(str, [*identity(options, sketch.size, args.world_size), drawn.hexdigest()])
            ),
        )
        first = args.rank == 0
        partial = options.output + ".partial"
        state = State(settings, partial, writes=first)
        with (
            termination_raises(),
            tqdm(
                unit="rows", total=settings.rows * settings.work_per_row, disable=not first
            ) as bar,
        ):
            variance_report.measure(step, texts, settings, state, bar.update, causal)
        if first:
            result = variance_report.report(state, settings, texts)
            result["autoregressive"]["checkpoint"] = options.autoregressive
            print(variance_figure.as_text(result))
            write_json(options.output, result)
            variance_figure.draw_figure(result, figure)
            os.unlink(partial)


def read_rows(loaded: "LoadedModel", options: argparse.Namespace) -> "list[ScoredRow]":
    """Rows from all over the data in random order, more than are measured.

    Raises:
        UserError: data that is too short, or that cannot be measured on.
    """
    from megatron_mdm.mcore.inference.eval_data import (
        POOL,
        is_pair_dataset,
        read_tokens,
        rows_from_documents,
        rows_from_pairs,
        shuffled,
    )

    args, pool = loaded.args, POOL * options.rows
    if not os.path.isfile(options.data) and is_pair_dataset(options.data):
        rows = rows_from_pairs(loaded, options.data, pool)
    else:
        enough = pool * args.seq_length
        documents = read_tokens(
            loaded, options.data, options.json_key, enough, options.seed, options.format
        )
        rows = rows_from_documents(loaded, documents, packed=True)
        rows = [row for row in rows if len(row.tokens) == args.seq_length]  # all but the last
    if any((row.tokens == loaded.mask_token_id).any() for row in rows):
        raise UserError(f"{options.data} contains the mask token: tokenize it again without")
    return shuffled(rows, options.seed)


def sketch_of(loaded: "LoadedModel", options: argparse.Namespace) -> "ParallelSketch":
    """The gradient of the parameters that --parameters names, projected if there are many.

    Raises:
        UserError: it names none.
    """
    from megatron_mdm.mcore.inference.measure import ParallelSketch
    from megatron_mdm.variance.sketch import MOST_WHOLE

    parameters = [p for name, p in loaded.model.named_parameters() if options.parameters in name]
    if not parameters:
        raise UserError(f"--parameters {options.parameters}: no parameter has that in its name")
    whole = ParallelSketch(parameters, None, options.seed)
    size = options.sketch or MOST_WHOLE
    if whole.count <= size:
        return whole
    return ParallelSketch(parameters, size, options.seed)


def identity(options: argparse.Namespace, size: int | None, world_size: int) -> list[Any]:
    """What a measurement that goes on must have in common with the one before."""
    checkpoints = [path for path in (options.load, options.autoregressive) if path]
    files = [str(Path(path, "latest_checkpointed_iteration.txt")) for path in checkpoints]
    files += [path for path in (options.data, f"{options.data}.bin") if os.path.isfile(path)]
    stamps = [(os.path.realpath(f), os.path.getsize(f), os.stat(f).st_mtime_ns) for f in files]
    iterations = [Path(file).read_text().strip() for file in files[: len(checkpoints)]]
    choices = [options.format, options.json_key, options.parameters]
    return [stamps, iterations, *choices, size, world_size]


if __name__ == "__main__":
    run_tool(main)
