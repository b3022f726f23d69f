"""Measures parallel decoding: tokens per forward pass against exact match.

A checkpoint answers problems, prompts with known responses, with each block size and --threshold,
and with one token a pass. A response is right if its text is that of the file. Decoding is greedy.
Tokens are those of a response up to its end. Passes count model calls that fill tokens, each row by
itself; a cache of keys and values adds one pass over the clean tokens of each block but the last.
"""

import argparse
import itertools
import json
from typing import TYPE_CHECKING, Any

from benchmarks.drawing import check_drawing, read_results
from megatron_mdm.checkpoint import open_checkpoint
from megatron_mdm.errors import UserError, check_numbers
from megatron_mdm.experiments.program import program
from megatron_mdm.files import check_output, write_json

if TYPE_CHECKING:
    from megatron_mdm.mcore.inference.loaded_model import LoadedModel

DESCRIPTION = "tokens per forward pass against exact match, by threshold and block size"
ROW = "row"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--load", help="checkpoint directory (the run's --save)")
    parser.add_argument("--problems", metavar="FILE", help="JSONL with prompt and response")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    parser.add_argument(
        "--report", metavar="FILE", help="draw these results of --json: measure nothing"
    )
    parser.add_argument("--figure", metavar="FILE", help="what --report draws: .png or .svg")
    for name, default, text in (
        ("--rows", 1000, "problems, the first ones of the file"),
        ("--batch-size", 250, "rows that are decoded together"),
    ):
        parser.add_argument(
            name, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    parser.add_argument(
        "--block-sizes",
        nargs="+",
        default=["4", "8", "16", ROW],
        metavar="SIZE",
        help=f"tokens in a block, or `{ROW}` (default: 4 8 16 {ROW})",
    )
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs="+",
        default=[0.5, 0.7, 0.9, 0.95, 0.99],
        metavar="P",
        help="thresholds of the decoder (default: 0.5 0.7 0.9 0.95 0.99)",
    )


def run(args: argparse.Namespace) -> None:
    """Measures, prints a table, and writes `args.json` if it is set; or draws results.

    Raises:
        UserError: a setting is not possible.
    """
    if args.report or args.figure:
        _draw(args.report, args.figure)
        return
    if not args.load or not args.problems:
        raise UserError("--load and --problems are needed: a checkpoint, and what it answers")
    check_numbers(args, "rows", "batch_size")
    sizes = [_size(text) for text in args.block_sizes]
    if not all(0.0 < threshold <= 1.0 for threshold in args.thresholds):
        raise UserError("--thresholds must lie in (0, 1]")
    if args.json:
        check_output(args.json, "--json")
    pairs = _read(args.problems, args.rows)
    # Layers for blocks run whole rows too, and not the reverse.
    opened = next((str(size) for size in sizes if size is not None), ROW)
    with open_checkpoint(args.load, args.device, block_size=opened) as loaded:
        results = [
            {
                "block_size": size or ROW,
                "threshold": threshold,
                **answers(loaded.in_blocks(size), pairs, threshold, args.batch_size),
            }
            for size in sizes
            for threshold in (*args.thresholds, None)
        ]
        document = {
            "benchmark": "parallel",
            "problems": len(pairs),
            "parameters": sum(p.numel() for p in loaded.model.parameters()),
            "program": program(),
            "rows": results,
        }
        if loaded.args.rank == 0:
            print(table(document))
            if args.json:
                write_json(args.json, document)


def _size(text: str) -> int | None:
    if text == ROW:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--block-sizes {text}: give a number from 1 on, or {ROW}")
    return int(text)


def _read(path: str, most: int) -> list[tuple[str, str]]:
    """The first prompts and responses of a file.

    Raises:
        UserError: it cannot be read, or is not JSONL of pairs.
    """
    try:
        with open(path, encoding="utf-8") as file:
            pairs = [json.loads(line) for line in itertools.islice(file, most)]
        found = [(str(pair["prompt"]), str(pair["response"])) for pair in pairs]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--problems {path}: give JSONL with prompt and response ({error!r})"
        ) from error
    if not found:
        raise UserError(f"--problems {path}: is empty; give JSONL with prompt and response")
    return found


def answers(
    loaded: "LoadedModel", pairs: list[tuple[str, str]], threshold: float | None, batch_size: int
) -> dict[str, float | str]:
    """Answers problems.

    Args:
        loaded: the model, with its block size.
        pairs: prompts and right responses.
        threshold: threshold of the decoder; None: one token a pass.
        batch_size: rows that are decoded together.

    Returns:
        tokens_per_pass: tokens of the responses per model call;
        exact_match, exact_match_stderr: the share of right responses;
        example: the response to the first problem.

    Raises:
        UserError: a prompt leaves no room for a response.
    """
    import torch

    from megatron_mdm.mcore.inference.eval_data import decoder_of, decoding_logits, encoder

    encode, length = encoder(loaded), loaded.args.seq_length
    mask, device = loaded.mask_token_id, torch.cuda.current_device()
    decoder = decoder_of(loaded, threshold=threshold)
    prompts = [encode(prompt) for prompt, _ in pairs]
    if max(map(len, prompts)) >= length:
        raise UserError(f"--problems: a prompt is as long as a row of the model, {length} tokens")
    rows = torch.tensor([ids + [mask] * (length - len(ids)) for ids in prompts])
    # Rows with prompts of the same length are in the same block most of the time.
    order = torch.tensor([len(ids) for ids in prompts]).argsort(stable=True)
    tokens, calls, example = 0, 0, ""
    right = torch.zeros(len(pairs), dtype=torch.float64)
    for part in order.split(batch_size):
        state = rows[part].to(device)
        for after in decoder.states(decoding_logits(loaded, length), state):
            calls += int((after != state).any(dim=1).sum())
            state = after
        for number, row in zip(part.tolist(), state.tolist(), strict=True):
            response = row[len(prompts[number]) :]
            ends = [place for place, token in enumerate(response) if token == loaded.end_token_id]
            written = response[: ends[0]] if ends else response
            tokens += len(written) + bool(ends)
            text = loaded.tokenizer.detokenize(written).strip()
            right[number] = float(text == pairs[number][1].strip())
            example = example if number else text
    return {
        "tokens_per_pass": tokens / calls,
        "exact_match": float(right.mean()),
        "exact_match_stderr": float((right.var(correction=0) / len(pairs)).sqrt()),
        "example": example,
    }


def table(document: dict[str, Any]) -> str:
    """The results as lines."""
    lines = [f"{document['problems']} problems, {document['parameters']:,} parameters"]
    lines.append(f"{'block':>6}{'threshold':>12}{'tokens/pass':>14}{'exact match':>18}")
    for row in document["rows"]:
        threshold = "one token" if row["threshold"] is None else f"{row['threshold']:g}"
        match = f"{row['exact_match']:.3f} +- {row['exact_match_stderr']:.3f}"
        speed = f"{row['tokens_per_pass']:.2f}"
        lines.append(f"{row['block_size']!s:>6}{threshold:>12}{speed:>14}{match:>18}")
    return "\n".join(lines)


def _draw(path: str | None, figure: str | None) -> None:
    """Draws the results of a run.

    Raises:
        UserError: one of the two flags is missing, or a file cannot be read or drawn.
    """
    figure = check_drawing(path, figure)
    assert path is not None  # checked
    from benchmarks import parallel_figure

    def points(document: dict[str, Any]) -> list[dict[str, Any]]:
        return [{key: row[key] for key in parallel_figure.DRAWN} for row in document["rows"]]

    parallel_figure.draw(read_results(path, "parallel", points), figure)
