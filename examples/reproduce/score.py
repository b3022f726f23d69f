"""Measures the share of held-out problems that a checkpoint solves with greedy decoding.

    python examples/reproduce/score.py --load CHECKPOINT --problems test.jsonl --json score.json

In each call a masked-diffusion model fills in its most probable prediction; with --threshold also
all predictions of at least this probability. An autoregressive model (--causal) decodes from left
to right. `answers` is the share of problems whose answer is right, and `solutions` the share of
those whose steps are all right as well. `right` has a bit for each problem, in order, that tells
whether the answer is right; the bits are written as hexadecimal digits.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
from problems import answer

from megatron_mdm.checkpoint import add_checkpoint_arguments, open_asked_for
from megatron_mdm.errors import UserError, run_tool
from megatron_mdm.files import write_json


def main() -> None:
    """Loads a checkpoint, decodes all problems and counts the right ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_arguments(parser, pipeline=False)
    parser.add_argument("--problems", required=True, metavar="FILE", help="JSONL of pairs")
    parser.add_argument("--causal", action="store_true", help="autoregressive, from left to right")
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="keep all predictions of at least this probability (default: only the most probable)",
    )
    parser.add_argument("--json", required=True, metavar="FILE", help="file to write")
    options = parser.parse_args()
    pairs = read_pairs(options.problems)
    with open_asked_for(options) as loaded:
        import torch

        from megatron_mdm.generation.decoder import Decoder

        tokenizer, mask = loaded.tokenizer, loaded.args.mdm_mask_token_id
        decoder = Decoder(
            mask,
            block_length=1 if options.causal else None,
            threshold=options.threshold,
            end_token_ids=(tokenizer.eod,),
            vocab_size=tokenizer.vocab_size,
        )
        length = loaded.args.seq_length
        prompts = [tokenizer.tokenize(pair["prompt"]) for pair in pairs]
        if max(map(len, prompts)) >= length:
            raise UserError(f"{options.problems}: a prompt is as long as the model's rows")
        rows = torch.tensor([row + [mask] * (length - len(row)) for row in prompts])
        rows = rows.to(torch.cuda.current_device())
        logits = partial(loaded.logits, causal=options.causal)
        # Rows of equal prompt length need about the same number of calls, so decode them together.
        order = torch.tensor(list(map(len, prompts))).argsort(stable=True).tolist()
        written = [torch.empty(0)] * len(rows)
        for part in torch.tensor(order).split(256):
            for number, row in zip(part.tolist(), decoder(logits, rows[part]), strict=True):
                written[number] = row
        texts = []
        for prompt, row in zip(prompts, written, strict=True):
            response = row.tolist()[len(prompt) :]
            end = response.index(tokenizer.eod) if tokenizer.eod in response else len(response)
            texts.append(tokenizer.detokenize(response[:end]).strip())
    right = [pair["response"].strip() for pair in pairs]
    correct = matches(map(answer, texts), map(answer, right))
    solved = matches(texts, right)
    result = {
        "answers": sum(correct) / len(pairs),
        "solutions": sum(solved) / len(pairs),
        "right": as_hex(correct),
        "problems": len(pairs),
        "examples": texts[:3],
    }
    write_json(options.json, result)
    print(f"{result['answers']:.1%} of the answers, {result['solutions']:.1%} with all steps")


def read_pairs(path: str) -> list[dict[str, str]]:
    """Reads problems with their solutions.

    Raises:
        UserError: the file cannot be read, or is not JSONL of pairs.
    """
    try:
        with open(path, encoding="utf-8") as file:
            pairs = [json.loads(line) for line in file]
        pairs = [{key: str(pair[key]) for key in ("prompt", "response")} for pair in pairs]
    except OSError as error:
        raise UserError(f"--problems {path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--problems {path}: give JSONL with prompt and response") from error
    if not pairs:
        raise UserError(f"--problems {path}: is empty; give JSONL with prompt and response")
    return pairs


def matches(found: Iterable[str | None], right: Iterable[str | None]) -> list[bool]:
    """Returns, for each found text, whether it equals the right one; None never does."""
    return [a is not None and a == b for a, b in zip(found, right, strict=True)]


def as_hex(bits: Sequence[bool]) -> str:
    """Writes bits as hexadecimal digits, four a digit; the last digit is padded with zeros."""
    return np.packbits(bits).tobytes().hex()[: -(-len(bits) // 4)]


def from_hex(digits: str, count: int) -> list[bool]:
    """Reads the first `count` bits of a text from `as_hex`."""
    values = bytes.fromhex(digits + "0" * (len(digits) % 2))
    bits: list[bool] = (
        np.unpackbits(np.frombuffer(values, np.uint8), count=count).astype(bool).tolist()
    )
    return bits


if __name__ == "__main__":
    run_tool(main)
