"""Measures parallel decoding: tokens per forward pass against exact match, on sums.

The program trains a small model on chains of sums modulo 10, in rows of clean and noisy tokens
(block diffusion), with a random block size for each batch. Then it answers held-out problems with
each block size and --threshold, and with one token a pass.

    7 + 5 - 4 + 1 =   ->   + 5 = 2 - 4 = 8 + 1 = 9

Every result needs the one before it, and the other tokens can be copied from the problem. A model
that is sure of a token too early makes errors. A loss of 0.43 nats per token, 3 ln(10) / 16, means
that the model guesses the sums, as it does after 1000 steps: its answers then say nothing about
thresholds. The result is for one training run of one model on one task. Passes count model calls
that fill tokens; a cache of keys and values adds one pass over the clean tokens of each block but
the last.
"""

import argparse
import json
import pathlib
from typing import TYPE_CHECKING, Any

from benchmarks.python_text import MASK
from megatron_mdm.errors import UserError, check_numbers
from megatron_mdm.experiments.program import program
from megatron_mdm.files import check_output, check_picture, write_json

if TYPE_CHECKING:
    import torch

    from benchmarks.toy_model import Model

DESCRIPTION = "tokens per forward pass against exact match, by threshold and block size"
SEED = 1234
BASE = 10  # numbers are the tokens 0 to 9
PLUS, MINUS, EQUALS, END = range(BASE, BASE + 4)
STEPS = 3  # sums of a problem
PROMPT = 2 + 2 * STEPS  # tokens: a number, signs and numbers, and =
LENGTH = PROMPT + 4 * STEPS + 4  # the response ends with END, and has 16 tokens
PROBLEMS = BASE * (2 * BASE) ** STEPS
ROW = "row"
BLOCK_SIZES = (2, 4, 8)  # and whole rows; they divide prompt and response
THRESHOLDS = (0.5, 0.7, 0.9, 0.95, 0.99)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    parser.add_argument(
        "--report", metavar="FILE", help="draw these results of --json: train nothing"
    )
    parser.add_argument("--figure", metavar="FILE", help="what --report draws: .png or .svg")
    numbers = {
        "--steps": (2500, "training steps"),
        "--batch": (64, "rows of a batch"),
        "--problems": (1000, "held-out problems"),
    }
    for name, (default, text) in numbers.items():
        parser.add_argument(
            name, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs="+",
        default=list(THRESHOLDS),
        metavar="P",
        help=f"thresholds of the decoder (default: {' '.join(map(str, THRESHOLDS))})",
    )


def run(args: argparse.Namespace) -> None:
    """Trains, measures, prints a table, and writes `args.json` if it is set; or draws results.

    Raises:
        UserError: a setting is not possible.
    """
    if args.report or args.figure:
        _draw(args.report, args.figure)
        return
    check_numbers(args, "steps", "batch", "problems")
    if args.problems > PROBLEMS // 2:
        raise UserError(f"--problems {args.problems}: must be at most {PROBLEMS // 2}")
    if not all(0.0 < threshold <= 1.0 for threshold in args.thresholds):
        raise UserError("--thresholds must lie in (0, 1]")
    if args.json:
        check_output(args.json, "--json")

    import torch

    from benchmarks.toy_model import Model

    torch.manual_seed(SEED)
    order = torch.randperm(PROBLEMS, generator=torch.Generator().manual_seed(SEED))
    held_out, others = order[: args.problems], order[args.problems :]
    model = Model(LENGTH)
    loss = train(model, rows(others), args.batch, args.steps)
    results = []
    for size in (*BLOCK_SIZES, None):
        for threshold in (*args.thresholds, None):
            measured = answers(model, rows(held_out), size, threshold)
            results.append({"block_size": size or ROW, "threshold": threshold, **measured})
    document = {
        "benchmark": "parallel",
        **{name: getattr(args, name) for name in ("steps", "batch", "problems")},
        "loss": loss,
        "program": program(),
        "rows": results,
    }
    print(table(document))
    if args.json:
        write_json(args.json, document)


def rows(numbers: "torch.Tensor") -> "torch.Tensor":
    """Makes problems with their responses: int64 [N, LENGTH].

    Args:
        numbers: which problems, int64 [N], from 0 to PROBLEMS - 1.
    """
    import torch

    value, rest = numbers % BASE, numbers // BASE
    prompt, response = [value], []
    for _ in range(STEPS):
        term, rest = rest % (2 * BASE), rest // (2 * BASE)
        number, minus = term % BASE, term // BASE
        value = (value + torch.where(minus == 1, -number, number)) % BASE
        told = [torch.where(minus == 1, MINUS, PLUS), number]
        prompt += told
        response += [*told, torch.full_like(value, EQUALS), value]
    end = [torch.full_like(value, END)] * 4
    return torch.stack([*prompt, torch.full_like(value, EQUALS), *response, *end], dim=1)


def train(model: "Model", texts: "torch.Tensor", batch: int, steps: int) -> float:
    """Trains a model on responses, with Adam and a random block size for each batch.

    Args:
        model: the model.
        texts: rows of tokens, int64 [N, LENGTH].
        batch: rows of a batch.
        steps: optimizer steps.

    Returns:
        The mean loss of the last 100 steps, in nats per token.
    """
    import numpy as np
    import torch

    from benchmarks.toy_model import EPS
    from megatron_mdm.objective.blocks import BlockRows
    from megatron_mdm.objective.corruption import Corrupter
    from megatron_mdm.objective.loss import row_losses
    from megatron_mdm.objective.randomness import GRID_BITS
    from megatron_mdm.objective.samplers import Uniform
    from megatron_mdm.objective.segments import counts

    corrupter = Corrupter(Uniform(), "bernoulli", MASK, EPS)
    generator = torch.Generator().manual_seed(SEED + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    sizes = (*BLOCK_SIZES, LENGTH)
    documents = torch.zeros(batch, LENGTH, dtype=torch.int64)
    eligible = torch.arange(LENGTH).expand_as(documents) >= PROMPT
    found = []
    for _ in range(steps):
        size = sizes[int(torch.randint(len(sizes), (), generator=generator))]
        copies = BlockRows(documents, size)
        clean = texts[torch.randint(len(texts), (batch,), generator=generator)]
        uniforms, quantiles = (
            torch.randint(2**GRID_BITS, clean.shape, generator=generator) for _ in range(2)
        )
        noisy = corrupter(clean, eligible, uniforms, quantiles, copies.blocks)
        tokens = copies.interleave(noisy.tokens, clean)
        logits = model(tokens, copies.position_ids(), ~copies.hidden())[1]
        scores = copies.separate(logits)[0].transpose(1, 2)
        cross_entropy = torch.nn.functional.cross_entropy(scores, clean, reduction="none")
        sums = row_losses(
            cross_entropy,
            noisy.mask,
            noisy.weight,
            counts(eligible, copies.blocks),
            "tokens",
            copies.blocks,
        )
        loss = sums.numerator / sums.denominator
        found.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return float(np.mean(found[-100:]))


def answers(
    model: "Model", texts: "torch.Tensor", size: int | None, threshold: float | None
) -> dict[str, float]:
    """Answers problems.

    Args:
        model: the model.
        texts: problems with their responses, int64 [N, LENGTH].
        size: tokens in a block; None: whole rows.
        threshold: threshold of the decoder; None: one token a pass.

    Returns:
        tokens_per_pass: tokens of the responses per model call, each row by itself;
        exact_match, exact_match_stderr: the share of right responses.
    """
    import torch

    from megatron_mdm.generation.decoder import Decoder
    from megatron_mdm.objective.blocks import hidden_in_decoding

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        end = tokens.shape[1]
        positions = torch.arange(end).expand_as(tokens)
        if size is None:
            found: torch.Tensor = model(tokens, positions)[1]
            return found
        start = (end - 1) // size * size
        seen = ~hidden_in_decoding(0, end, start, size)
        found = model(tokens, positions, seen)[1]
        return found[:, start:]

    blank = texts.clone()
    blank[:, PROMPT:] = MASK
    decoder = Decoder(MASK, block_size=size, threshold=threshold, vocab_size=MASK)
    calls, state = torch.zeros(len(texts)), blank
    for after in decoder.states(logits, blank):
        calls += (after != state).any(dim=1)
        state = after
    right = (state == texts).all(dim=1).double()
    return {
        "tokens_per_pass": float((LENGTH - PROMPT) * len(texts) / calls.sum()),
        "exact_match": float(right.mean()),
        "exact_match_stderr": float((right.var(correction=0) / len(texts)).sqrt()),
    }


def table(document: dict[str, Any]) -> str:
    """The results as lines."""
    lines = [f"loss {document['loss']:.3f} nats per token after {document['steps']} steps"]
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
    if not path or not figure:
        raise UserError("--report and --figure need each other: what to draw, and where to")
    check_picture(figure, "--figure")
    check_output(figure, "--figure")
    from benchmarks import parallel_figure

    try:
        document = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        points = [{key: row[key] for key in parallel_figure.DRAWN} for row in document["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path}: is not a result file of "benchmark.py parallel --json" ({error!r})'
        ) from error
    parallel_figure.draw(points, figure)
