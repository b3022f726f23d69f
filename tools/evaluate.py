"""Estimates the NELBO of a checkpoint on text: nats per token and bits per byte, with error bars.

    python tools/evaluate.py --load checkpoints --data held_out.jsonl --json nelbo.json
    python tools/evaluate.py --load checkpoints --data my_text --rows 500 --draws 16

--data is a text or JSONL file, or the prefix of a .bin/.idx pair. The rows are drawn from all over
it: whole documents at random, and rows of these at random. Rates are stratified, masks have an
exact count, every row is masked --draws times. Of the two error bars the first is for the choice of
documents and masks together, and grows with the kinship of rows of one document; the second is for
the masks alone: take it to compare two checkpoints on the same rows with the same seed. Bits per
byte count the tokens that are scored, as
the checkpoint's run did. Under torchrun the ranks share the model.
"""

import argparse
import math

from megatron_mdm.checkpoint import add_checkpoint_arguments, open_asked_for
from megatron_mdm.data.documents import add_format_argument
from megatron_mdm.data.outputs import write_json
from megatron_mdm.errors import UserError, run_tool


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("--data", required=True, help="file, or prefix of .bin/.idx")
    parser.add_argument(
        "--rows", type=int, default=200, help="most rows to score (default: %(default)s)"
    )
    parser.add_argument(
        "--draws", type=int, default=8, help="masks of a row, even (default: %(default)s)"
    )
    parser.add_argument("--bins", type=int, default=10, help="bins of t (default: %(default)s)")
    parser.add_argument(
        "--per-document",
        action="store_true",
        help="begin a row with every document, instead of packing them as pretraining does",
    )
    add_format_argument(parser, "of --data, if it is a file")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="(default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of rows, rates and masks (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, help="rows in a call (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    return parser.parse_args()


def main() -> None:
    """Loads, draws, prints."""
    options = parse()
    if min(options.rows, options.bins, options.batch_size) < 1:
        raise UserError("--rows, --bins and --batch-size must be at least 1")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: must not be negative")
    if options.draws < 2 or options.draws % 2:
        raise UserError(f"--draws must be even and at least 2, got {options.draws}")
    with open_asked_for(options) as loaded:
        import torch
        from tqdm import tqdm

        from megatron_mdm.evaluation import evaluate
        from megatron_mdm.mcore.texts import POOL, read_tokens, rows_of, scored_per_byte, shuffled

        enough = POOL * options.rows * loaded.args.seq_length
        documents = read_tokens(
            loaded, options.data, options.json_key, enough, options.seed, options.format
        )
        every = rows_of(loaded, documents, not options.per_document)
        rows = shuffled(every, options.seed)[: options.rows]
        bar = tqdm(unit="masks", total=len(rows) * options.draws, disable=loaded.args.rank != 0)
        result = evaluate(
            loaded.logits,
            rows,
            loaded.mask_token_id,
            options.draws,
            options.bins,
            options.seed,
            options.batch_size,
            torch.cuda.current_device(),
            bar.update,
        )
        bar.close()
        if loaded.args.rank == 0:
            # Of all documents that were read, of which the rows hold parts.
            report(options, result, scored_per_byte(loaded, every, documents))


def report(options: argparse.Namespace, result, tokens_per_byte: float | None) -> None:
    """Prints the results, and writes them to --json.

    Args:
        options: of the command line.
        result: of `evaluate`.
        tokens_per_byte: tokens that are scored for each byte of text, None if that is not known.
    """
    lines = [
        f"{result.num_tokens:,} tokens in {result.num_texts} rows of {result.num_documents} "
        f"documents, {result.num_draws} masks each",
        f"NELBO {_text(result.nelbo)} nats/token",
    ]
    if result.nelbo.stderr is None:
        lines.append("its error over the choice of documents is unknown: it takes rows of several")
    figures = {
        "nelbo": _figures(result.nelbo),
        "num_tokens": result.num_tokens,
        "num_rows": result.num_texts,
        "num_documents": result.num_documents,
        "num_draws": result.num_draws,
        "seed": options.seed,
    }
    if tokens_per_byte:
        factor = tokens_per_byte / math.log(2)
        lines.append(f"NELBO {_text(result.nelbo, factor)} bits/byte")
        figures["bits_per_byte"] = _figures(result.nelbo, factor)
    width = 1 / len(result.bins)
    bins = []
    for i, estimate in enumerate(result.bins):
        low, high = i * width, (i + 1) * width
        if estimate is not None:
            stderr = "unknown" if estimate.stderr is None else f"{estimate.stderr:.4f}"
            lines.append(f"t in ({low:.2f}, {high:.2f}]  {estimate.value:.4f} +- {stderr}")
            bins.append(
                {"low": low, "high": high, "value": estimate.value, "stderr": estimate.stderr}
            )
    print("\n".join(lines))
    if options.json:
        write_json(options.json, {**figures, "bins": bins})


def _text(estimate, factor: float = 1.0) -> str:
    stderr = "unknown" if estimate.stderr is None else f"{factor * estimate.stderr:.4f}"
    masks = f"{factor * estimate.draw_stderr:.4f}"
    return f"{factor * estimate.value:.4f} +- {stderr} (masks alone: {masks})"


def _figures(estimate, factor: float = 1.0) -> dict[str, float | None]:
    return {
        "value": factor * estimate.value,
        "stderr": None if estimate.stderr is None else factor * estimate.stderr,
        "draw_stderr": factor * estimate.draw_stderr,
    }


if __name__ == "__main__":
    run_tool(main)
