"""Measures decoding in blocks: with a cache of keys and values, without one, and in whole rows.

A checkpoint continues a prompt of random tokens. A model call keeps --tokens-per-call tokens, so
that all sides take about the same number of calls. Whole rows are computed in every call. Without a
cache, blocks are computed together with all text before them. The sides take turns, so that other
load on the machine affects all of them. The speed does not depend on what the checkpoint has
learned.
"""

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.timing import device_name, quartiles, seconds_of
from megatron_mdm.checkpoint import open_checkpoint
from megatron_mdm.errors import UserError, check_numbers
from megatron_mdm.files import write_json

if TYPE_CHECKING:
    from megatron_mdm.mcore.inference.loaded_model import LoadedModel

DESCRIPTION = "tokens/s of decoding in blocks, with a cache of keys and values and without"
WHOLE_ROWS = "whole rows"
_NUMBERS = ("prompt_length", "length", "batch_size", "tokens_per_call", "repeats")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--load", required=True, help="checkpoint directory (the run's --save)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    numbers: dict[str, tuple[int, str]] = {
        "--prompt-length": (32, "tokens of the prompt"),
        "--length": (96, "tokens to write"),
        "--batch-size": (1, "rows that are written together"),
        "--tokens-per-call": (1, "tokens that a model call keeps"),
        "--repeats": (5, "turns of each side"),
    }
    for name, (default, text) in numbers.items():
        parser.add_argument(
            name, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    parser.add_argument(
        "--block-sizes",
        type=int,
        nargs="+",
        default=[4, 32],
        metavar="N",
        help="tokens in a block (default: 4 32)",
    )


def run(args: argparse.Namespace) -> None:
    """Measures, prints a table, and writes the file `args.json` if it is given.

    Raises:
        UserError: a size is not possible.
    """
    check_numbers(args, *_NUMBERS)
    if min(args.block_sizes) < 1:
        raise UserError("--block-sizes must be at least 1")
    # Layers for blocks run whole rows too, and not the reverse.
    with open_checkpoint(args.load, args.device, block_size=str(args.block_sizes[0])) as loaded:
        total = args.prompt_length + args.length
        if total > loaded.max_length:
            raise UserError(
                f"--prompt-length and --length make {total} tokens, and the model has "
                f"{loaded.max_length} positions: lower one of them"
            )
        results = measure(loaded, args)
        if loaded.args.rank == 0:
            print(table(results))
            if args.json:
                write_json(args.json, results)


def measure(loaded: "LoadedModel", args: argparse.Namespace) -> dict[str, Any]:
    """Returns seconds and calls of each side, and the ratios of tokens/s to those of no cache."""
    import torch

    from megatron_mdm.mcore.inference.eval_data import vocab_size

    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(vocab_size(loaded))
    ids = ids[ids != loaded.mask_token_id]
    shape = args.batch_size, args.prompt_length
    prompt = ids[torch.randint(len(ids), shape, generator=generator)]
    masks = torch.full((args.batch_size, args.length), loaded.mask_token_id)
    row = torch.cat([prompt, masks], dim=1).to(torch.cuda.current_device())
    sides: dict[str, Side] = {WHOLE_ROWS: Side(loaded, None, False)}
    for size in args.block_sizes:
        sides[f"block {size}, no cache"] = Side(loaded, size, False)
        sides[f"block {size}, cache"] = Side(loaded, size, True)
    for side in sides.values():
        side.write(row, args.tokens_per_call)  # allocates, and is not counted
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, side in sides.items():
            write = partial(side.write, row, args.tokens_per_call)
            seconds[name].append(seconds_of(write, args.device))
    tokens = args.batch_size * args.length
    found = {
        name: {
            "calls": sides[name].calls,
            "seconds": own,
            "tokens_per_second": tokens / quartiles(own)["median"],
        }
        for name, own in seconds.items()
    }
    pairs = [(f"block {size}, cache", f"block {size}, no cache") for size in args.block_sizes]
    pairs += [(name, WHOLE_ROWS) for name, _ in pairs]
    ratios = {
        f"{name} / {other}": quartiles(
            [b / a for a, b in zip(seconds[name], seconds[other], strict=True)]
        )
        for name, other in pairs
    }
    settings = {name: getattr(args, name) for name in (*_NUMBERS, "block_sizes")}
    return {
        "benchmark": "decoding",
        "device": device_name(args.device),
        "settings": settings,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "sides": found,
        "ratios": ratios,
    }


class Side:
    """A way to decode.

    Args:
        loaded: the model.
        size: tokens in a block; None: whole rows.
        cached: whether finished blocks are cached.

    Attributes:
        calls: model calls of the last `write`.
    """

    def __init__(self, loaded: "LoadedModel", size: int | None, cached: bool) -> None:
        self._loaded, self._cached = loaded.in_blocks(size), cached
        self.calls = 0

    def write(self, row: "Any", tokens_per_call: int) -> None:
        """Decodes rows.

        Args:
            row: int64 [b, s], with the mask token at the positions to fill.
            tokens_per_call: tokens that a call keeps, on average over a row.
        """
        from megatron_mdm.mcore.inference.eval_data import decoder_of, decoding_logits

        size, length = self._loaded.block_size, row.shape[1]
        wanted = int((row[0] == self._loaded.mask_token_id).sum())
        fewest = 1 if size is None else -(-length // size)
        steps = min(wanted, max(fewest, -(-wanted // tokens_per_call)))
        decoder = decoder_of(self._loaded, (), steps=steps)
        logits = decoding_logits(self._loaded, length, self._cached)
        self.calls = len(list(decoder.states(logits, row))) - 1


def table(results: dict[str, Any]) -> str:
    """The results as lines."""
    lines = [f"{'':24}{'calls':>8}{'tokens/s':>12}"]
    for name, side in results["sides"].items():
        lines.append(f"{name:24}{side['calls']:>8}{side['tokens_per_second']:>12.1f}")
    for name, ratio in results["ratios"].items():
        low, high = ratio["quartiles"]
        lines.append(f"{name}: {ratio['median']:.2f} times the tokens/s ({low:.2f} to {high:.2f})")
    return "\n".join(lines)
