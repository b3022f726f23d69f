r"""Measures where the noise of training comes from, and how much of it each method leaves.

    python tools/variance_report.py --load checkpoints --data my_text --output variance.json
    python tools/variance_report.py --load checkpoints --data my_text --output variance.json \
        --methods mirror 4-views ppots-gradient+lattice+exact-count

The tool writes variance.json and variance.png, and prints the table. --data is text, or prompts and
responses (.bin/.idx), of which only the responses are masked. Rows are drawn from all over the
data.

Nested draws of rows, rates and masks give the shares of the masking pattern (A), the masking rate
(B) and the data (C) in the variance of the loss and of the gradient of one row. Beside them stands
the data noise of the same network on the same rows as an autoregressive model, with a causal mask
and next tokens. For this, --autoregressive names the weights of a model that was trained so,
because a diffusion model predicts no next tokens. Other masks of the same rows give the table of
methods.

The estimates are unbiased, so a small B or C can come out negative: see the error bars. An
interrupted run keeps its measurements in variance.json.partial, and the same command continues.
Under torchrun the ranks share the model as tensor-parallel ranks.
"""

import argparse
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mdm.checkpoint import (
    add_block_size_argument,
    add_checkpoint_arguments,
    open_asked_for,
)
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
    parser.add_argument(
        "--data", required=True, help="text or JSONL file, or prefix of a .bin/.idx pair"
    )
    parser.add_argument("--output", required=True, metavar="X.json", help="JSON file to write")
    parser.add_argument(
        "--figure",
        metavar="FILE",
        help="picture to write, PNG or SVG (default: X.png beside --output)",
    )
    for name, default, meaning in (
        ("--rows", 200, "number of rows of the nested draws; more rows give smaller error bars"),
        ("--rates", 4, "number of rates of each row"),
        ("--masks", 2, "number of masks at each rate"),
        ("--batch", 32, "number of rows of a batch in the table of methods"),
        ("--bins", 10, "number of bins of t in the curves"),
        ("--seed", 0, "seed of texts, rates and masks"),
    ):
        parser.add_argument(
            name, type=int, default=default, metavar="N", help=f"{meaning} (default: {default})"
        )
    add_block_size_argument(parser)
    parser.add_argument(
        "--rate-per",
        choices=["row", "document", "block"],
        default="row",
        help="unit that draws a masking rate, for A, B and C (default: row). The table of methods "
        "has one rate a row, so other units need --methods none",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["important"],
        metavar="NAME",
        help="rows of the table of methods: `important`, `all` (every combination), `none`, or "
        "names of methods joined by + (default: important)",
    )
    parser.add_argument(
        "--isad-token-ids",
        type=int,
        nargs="+",
        metavar="ID",
        help="ids of the tokens that ISAD masks more often (default: those of the checkpoint's "
        "run; without any, ISAD is left out)",
    )
    parser.add_argument(
        "--autoregressive",
        metavar="CHECKPOINT",
        help="checkpoint of the same network trained on next tokens (python -m "
        "megatron_mdm.experiments.autoregressive)",
    )
    parser.add_argument(
        "--parameters",
        default="",
        metavar="TEXT",
        help="measure only the gradient of parameters whose names contain this (default: of all)",
    )
    parser.add_argument(
        "--sketch",
        type=int,
        metavar="D",
        help="project gradients of more than D parameters at random to D numbers, which preserves "
        "variances on average (default: 8192)",
    )
    add_format_argument(parser, "format of the file of --data")
    parser.add_argument(
        "--json-key",
        default="text",
        metavar="KEY",
        help="key of the text in lines of JSONL (default: %(default)s)",
    )
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
    # Bad settings end the run before the checkpoint is loaded.
    methods = choose(options.methods, isad=True)
    variance_report.Settings(
        **numbers,
        methods=methods,
        isad_token_ids=(0,),
        mask_token_id=0,
        eps=0.5,
        rate_per=options.rate_per,
        block_size=1,
    )
    with open_asked_for(options, block_size=options.block_size) as loaded:
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
        # A digest of the rows: measurements of other rows are not continued.
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
            rate_per=options.rate_per,
            block_size=loaded.block_size,
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
            write_json(options.output, result)
            print(variance_figure.as_text(result))
            variance_figure.draw_figure(result, figure)
            os.unlink(partial)


def read_rows(loaded: "LoadedModel", options: argparse.Namespace) -> "list[ScoredRow]":
    """Rows from all over the data in random order; there are more than will be measured.

    Raises:
        UserError: the data are too short, or have other properties that prevent a measurement.
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
        raise UserError(f"{options.data} contains the mask token: tokenize texts without it")
    return shuffled(rows, options.seed)


def sketch_of(loaded: "LoadedModel", options: argparse.Namespace) -> "ParallelSketch":
    """The gradient of the parameters that --parameters selects, projected if there are many.

    Raises:
        UserError: --parameters selects none.
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
    """What an interrupted measurement and its continuation must have in common."""
    checkpoints = [path for path in (options.load, options.autoregressive) if path]
    files = [str(Path(path, "latest_checkpointed_iteration.txt")) for path in checkpoints]
    files += [path for path in (options.data, f"{options.data}.bin") if os.path.isfile(path)]
    stamps = [(os.path.realpath(f), os.path.getsize(f), os.stat(f).st_mtime_ns) for f in files]
    iterations = [Path(file).read_text().strip() for file in files[: len(checkpoints)]]
    choices = [options.format, options.json_key, options.parameters]
    return [stamps, iterations, *choices, size, world_size]


if __name__ == "__main__":
    run_tool(main)
