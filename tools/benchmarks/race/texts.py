"""Writes rows with a checkpoint, from masks only, and judges rows with an autoregressive model.

    python -m benchmarks.race.texts write --load CHECKPOINT --rows 256 --output rows.npy
    python -m benchmarks.race.texts read --load JUDGE --rows rows.npy held_out.npy --json read.json

`write` samples rows of the model's length. `read` computes two numbers for each file: the mean over
rows of the NLL per token, from the second token on, under a model of
megatron_mdm.experiments.autoregressive; and the share of distinct 4-grams among all 4-grams,
because a text that repeats itself has a low NLL.
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_mdm.checkpoint import add_checkpoint_arguments, open_asked_for
from megatron_mdm.errors import run_tool
from megatron_mdm.files import complete_or_absent, write_json
from megatron_mdm.objective.types import Floats, Integers

if TYPE_CHECKING:
    import torch

    from megatron_mdm.generation.decoder import Decoder, LogitsFunction

GRAM = 4
BATCH = 64  # rows in a call of the model


def write(
    logits: "LogitsFunction",
    decoder: "Decoder",
    num_rows: int,
    length: int,
    seed: int,
    device: Any = "cpu",
) -> Integers:
    """Decodes rows from masks, int64 [num_rows, length].

    Args:
        logits: see `Decoder.states`.
        decoder: the model's decoder.
        num_rows: number of rows to write.
        length: tokens of a row.
        seed: seed of the random numbers; each row has its own random numbers.
        device: device of the tokens that `logits` takes.
    """
    import torch

    seeds = np.random.SeedSequence(seed).generate_state(num_rows, np.uint64)
    generators = [torch.Generator(device).manual_seed(int(word >> 1)) for word in seeds]
    masks = torch.full((num_rows, length), decoder.mask_token_id, device=device)
    written = [
        decoder(logits, masks[first : first + BATCH], generators[first : first + BATCH])
        for first in range(0, num_rows, BATCH)
    ]
    rows: Integers = torch.cat(written).cpu().numpy()
    return rows


def read(
    logits: Callable[["torch.Tensor"], "torch.Tensor"], rows: Integers, device: Any = "cpu"
) -> Floats:
    """Computes the NLL per token of each row, in nats, without the first token [N].

    Args:
        logits: maps tokens int64 [b, L] to logits float [b, L, V]; position i predicts token i from
            the tokens before it.
        rows: rows of tokens, int64 [N, L].
        device: device of the tokens that `logits` takes.
    """
    import torch

    found = []
    for tokens in torch.from_numpy(rows).to(device).split(BATCH):
        scores = logits(tokens)[:, 1:].double()
        losses = torch.nn.functional.cross_entropy(
            scores.transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        found.append(losses.mean(dim=1).cpu())
    nats: Floats = torch.cat(found).numpy()
    return nats


def distinct(rows: Integers, size: int = GRAM) -> float:
    """Returns the share of distinct n-grams among all n-grams within rows, in (0, 1].

    The share falls with the number of rows, so compare equal numbers of rows.

    Args:
        rows: integers [N, L].
        size: n.
    """
    grams = np.lib.stride_tricks.sliding_window_view(rows, size, axis=1).reshape(-1, size)
    return len(np.unique(grams, axis=0)) / len(grams)


def main() -> None:
    """Runs the command `write` or `read`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    writer = commands.add_parser("write", help="sample rows from masks only")
    writer.add_argument("--rows", type=int, default=256, metavar="N")
    writer.add_argument("--steps", type=int, default=64, help="calls of the model for a row")
    writer.add_argument("--remasking", choices=["random", "low-confidence"], default="random")
    writer.add_argument("--temperature", type=float, default=1.0)
    writer.add_argument("--seed", type=int, default=0)
    writer.add_argument("--output", required=True, metavar="FILE", help=".npy to write")
    reader = commands.add_parser("read", help="NLL and distinct 4-grams of rows")
    reader.add_argument("--rows", nargs="+", required=True, metavar="FILE", help=".npy of rows")
    reader.add_argument("--json", required=True, metavar="FILE")
    for command in (writer, reader):
        add_checkpoint_arguments(command, pipeline=False)
    options = parser.parse_args()
    with open_asked_for(options) as loaded:
        import torch

        from megatron_mdm.mcore.inference.eval_data import decoder_of

        device = torch.cuda.current_device()
        if options.command == "write":
            settings = {x: getattr(options, x) for x in ("steps", "remasking", "temperature")}
            decoder = decoder_of(loaded, (), **settings)
            length = loaded.args.seq_length
            written = write(loaded.logits, decoder, options.rows, length, options.seed, device)
            with complete_or_absent(options.output) as (part,), open(part, "wb") as file:
                np.save(file, written)
            return
        result = {}
        for path in options.rows:
            rows = np.load(path)
            nats = read(lambda tokens: loaded.logits(tokens, causal=True), rows, device)
            result[path] = {
                "nll": float(nats.mean()),
                "stderr": float(nats.std(ddof=1) / len(nats) ** 0.5),
                "distinct": distinct(rows),
            }
        write_json(options.json, result)


if __name__ == "__main__":
    run_tool(main)
