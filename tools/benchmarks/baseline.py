"""Tokens/s and memory against a plain training loop on a Hugging Face model, on one device.

The loop is what a user writes who follows the released recipe of LLaDA: rates t uniform for each
row, Bernoulli masks with p = (1 - eps) t + eps, logits at all positions, cross entropies of masked
tokens weighted by 1/p, AdamW, gradients clipped at 1. Its model is transformers' Llama of the same
sizes with attention in both directions (torch's scaled_dot_product_attention); its rows lie ready
in memory. The other sides are whole training steps of Megatron's with this plugin, data included,
with the head at all positions and at masked ones. They take turns in one process, on CUDA in
bfloat16 (the loop under autocast) if there is a GPU, else on the CPU in float32; clocks and peaks
are those of `overhead`. Both keep weights and two moments, Megatron gradients as well, which the
loop frees between steps: `resting_bytes` says what each side has then.
"""

import argparse
import concurrent.futures
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from benchmarks import overhead
from benchmarks.race import MASK, write_data
from benchmarks.timing import device_name, spread
from megatron_mdm.errors import UserError
from megatron_mdm.files import write_json

if TYPE_CHECKING:
    import torch

DESCRIPTION = "tokens/s and memory of a training step against a plain Hugging Face loop"
add_arguments = overhead.add_arguments
EPS = 1e-3
SIDES = ("hugging_face", "full_head", "masked_head")


def run(args: argparse.Namespace) -> None:
    """Measures, prints a table, and writes `args.json` if it is set.

    Raises:
        UserError: a size that cannot work, or transformers is missing.
    """
    overhead.check(args)
    device = overhead.use_device()
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}: pip install 'megatron-mdm[hf]'") from error
    sizes = overhead.sizes_of(args, device)
    with tempfile.TemporaryDirectory() as directory, redirect_stdout(sys.stderr):
        results = measure(
            device, pathlib.Path(directory), sizes, args.vocabulary, args.window, args.rounds
        )
    print(_table(results))
    if args.json:
        write_json(args.json, results)


class PlainLoop:
    """The loop, a step at a time.

    Args:
        sizes: see `overhead.OPTIONS`.
        vocabulary: rows of the embedding.
        device: `cuda` or `cpu`.
    """

    def __init__(self, sizes: dict[str, int], vocabulary: int, device: str) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        self.device = device
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=sizes["hidden"],
                intermediate_size=overhead.ffn_size(sizes["hidden"], device),
                num_hidden_layers=sizes["layers"],
                num_attention_heads=sizes["heads"],
                max_position_embeddings=sizes["length"],
                tie_word_embeddings=False,
                use_cache=False,
            )
        ).to(device)
        for layer in self.model.model.layers:
            layer.self_attn.is_causal = False
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1
        )

    def loss(self, tokens: "torch.Tensor") -> "torch.Tensor":
        """The objective of LLaDA's pretraining on clean tokens [b, s], nats per token."""
        import torch

        b, s = tokens.shape
        t = torch.rand(b, device=self.device)
        p = ((1 - EPS) * t + EPS)[:, None].expand(b, s)
        mask = torch.rand(b, s, device=self.device) < p
        logits = self.model(torch.where(mask, MASK, tokens)).logits
        losses = torch.nn.functional.cross_entropy(logits[mask], tokens[mask], reduction="none")
        return (losses / p[mask]).sum() / (b * s)

    def step(self, tokens: "torch.Tensor") -> None:
        """One optimizer step on clean tokens [b, s]."""
        import torch

        tokens = tokens.to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = self.loss(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(
    device: str,
    directory: pathlib.Path,
    sizes: dict[str, int],
    vocabulary: int,
    window: int,
    rounds: int,
) -> dict[str, Any]:
    """Times and peaks of all sides; see `overhead.measure`."""
    import torch

    from megatron_mdm.mcore.device import training_device

    loop = PlainLoop(sizes, vocabulary, device)
    shape = (sizes["rows"], sizes["length"])
    # Megatron's CPU mode makes every torch call of its thread a little slower, and not of others.
    own_thread = concurrent.futures.ThreadPoolExecutor(1)

    def hugging_face() -> None:
        tokens = torch.randint(MASK, shape)
        own_thread.submit(loop.step, tokens).result()

    write_data(directory)
    flags = [
        *overhead.model_flags(sizes, vocabulary, device),
        *f"--data-path {directory / 'text'} --data-cache-path {directory / 'cache'}".split(),
    ]
    with own_thread, training_device(device):
        from benchmarks.session import training_session

        with training_session(flags) as session:
            steps = {"hugging_face": hugging_face, **_our_steps(session)}
            seconds, peaks = overhead.interleave(steps, window, rounds, device)
            parameters = _count(session.model[0])
            if parameters != _count(loop.model):
                raise RuntimeError("the two models differ in their number of parameters")
    per_parameter = {"hugging_face": 12, "ours": 18 if device == "cuda" else 16}
    rest = {side: parameters * per_parameter.get(side, per_parameter["ours"]) for side in SIDES}
    ratios = {
        side: spread([hf / x for hf, x in zip(seconds["hugging_face"], seconds[side], strict=True)])
        for side in SIDES[1:]
    }
    has_peaks = bool(peaks["hugging_face"])
    memory = {side: rest[side] + peaks[side] if has_peaks else None for side in SIDES}
    return {
        "benchmark": "baseline",
        "device": device_name(device),
        "clock": "wall" if device == "cuda" else "processor time of the process",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **sizes,
        "vocabulary": vocabulary,
        "parameters": parameters,
        "window": window,
        **{f"tokens_per_s_ratio_{side}": ratios[side]["median"] for side in SIDES[1:]},
        **{
            f"memory_ratio_{side}": memory[side] / memory["hugging_face"] if has_peaks else None
            for side in SIDES[1:]
        },
        "tokens_per_s_ratios": ratios,
        "sides": {
            side: {
                "tokens_per_s": shape[0] * shape[1] / statistics.median(seconds[side]),
                "seconds": seconds[side],
                "resting_bytes": rest[side],
                "peak_bytes": peaks[side],
            }
            for side in SIDES
        },
    }


def _our_steps(session: Any) -> dict[str, Callable[[], None]]:
    rows = session.rows(session.objective.datasets_provider)

    def ours(head: str) -> Callable[[], None]:
        objective = session.with_head(head)
        return lambda: session.step(objective.forward_step, rows, objective.after_gradients)

    return {"full_head": ours("full"), "masked_head": ours("masked")}


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _table(results: dict[str, Any]) -> str:
    lines = [
        f"{results['layers']} layers of {results['hidden']}, vocabulary {results['vocabulary']}, "
        f"{results['rows']} rows of {results['length']}, {results['device']}, threads "
        f"{results['threads']}; {results['clock']}",
        f"{'':14}{'tokens/s':>10}{'ratio':>8}{'quartiles':>16}{'rest MB':>10}{'step MB':>10}"
        f"{'ratio':>8}",
    ]
    for side, values in results["sides"].items():
        line = f"{side.replace('_', ' '):14}{values['tokens_per_s']:>10.0f}"
        ratio = results["tokens_per_s_ratios"].get(side)
        quartiles = "{:.3f} - {:.3f}".format(*ratio["quartiles"]) if ratio else ""
        line += f"{ratio['median'] if ratio else 1:>8.3f}{quartiles:>16}"
        line += f"{values['resting_bytes'] / 1e6:>10.0f}"
        if values["peak_bytes"] is not None:
            memory = results.get(f"memory_ratio_{side}", 1.0)
            line += f"{values['peak_bytes'] / 1e6:>10.0f}{memory:>8.2f}"
        lines.append(line)
    return "\n".join(lines)
