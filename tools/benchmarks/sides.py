"""Kinds of training steps, the sides, that take turns on one model: what two benchmarks share.

`gpt` is a step with Megatron's next-token loss over its GPTDataset. `full_head` and `masked_head`
are steps with this objective, with logits at all positions and at masked ones. Each is a whole
training step of Megatron's with its data, its loss checks and its optimizer. The three have one
model, and attend to all positions: what is compared is the objective. `causal` is GPT with the
causal attention that it really has, which the local layers on a CPU pay for with a mask, and fused
kernels on a GPU turn to profit.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.python_text import MASK
from benchmarks.timing import quartiles, seconds_of, time_and_peak_memory

MEGATRON_SIDES = ("gpt", "full_head", "masked_head", "causal")
LLADA_VOCABULARY = 126_464
SIZES = ("layers", "hidden", "heads", "rows", "length")


def ffn_size(hidden: int, device: str) -> int:
    """Llama's width of the feed-forward layer, 8/3 of the hidden size.

    In multiples of 32, and on CUDA of 128: these fill the tiles of its matrix products, and
    blockwise FP8 has scales for blocks of 128.
    """
    multiple = 128 if device == "cuda" else 32
    return -(-hidden * 8 // 3 // multiple) * multiple


def model_flags(sizes: dict[str, int], vocabulary: int, device: str) -> list[str]:
    """Flags of a Llama-like model, its rows and its optimizer.

    Args:
        sizes: values of `SIZES`.
        vocabulary: rows of the output layer.
        device: `cuda` or `cpu`.
    """
    layers, hidden, heads, rows, length = (sizes[name] for name in SIZES)
    ffn = ffn_size(hidden, device)
    return [
        *f"--mdm-device {device} --num-layers {layers} --hidden-size {hidden}".split(),
        *f"--num-attention-heads {heads} --ffn-hidden-size {ffn} --seq-length {length}".split(),
        *f"--max-position-embeddings {length} --position-embedding-type rope".split(),
        *"--normalization RMSNorm --swiglu --disable-bias-linear --attention-dropout 0".split(),
        *"--hidden-dropout 0 --untie-embeddings-and-output-weights --num-workers 0".split(),
        *f"--micro-batch-size {rows} --global-batch-size {rows} --train-iters 100000".split(),
        *f"--tokenizer-type NullTokenizer --vocab-size {vocabulary}".split(),
        *f"--make-vocab-size-divisible-by 1 --mdm-mask-token-id {MASK}".split(),
        *"--null-tokenizer-eod-id 0 --split 100,0,0 --eval-iters 0 --eval-interval 1000000".split(),
        *"--lr 1e-4 --lr-warmup-iters 10 --lr-decay-style constant --log-interval 20".split(),
        *("--bf16 --cross-entropy-loss-fusion".split() if device == "cuda" else []),
    ]


def megatron_steps(session: Any) -> dict[str, Callable[[], None]]:
    """A training step of each of `MEGATRON_SIDES`, with rows of its own.

    Args:
        session: of session.py.
    """
    from megatron.core.distributed import finalize_model_grads

    from benchmarks.causal import causal_datasets, causal_forward_step
    from megatron_mdm.mcore.model.causal import causal_attention

    causal_rows = session.rows(causal_datasets)
    rows = session.rows(session.objective.datasets_provider)

    def gpt() -> None:
        session.step(causal_forward_step, causal_rows, finalize_model_grads)

    def causal() -> None:
        with causal_attention(session.model[0]):
            gpt()

    def ours(head: str) -> Callable[[], None]:
        objective = session.with_head(head)
        return lambda: session.step(objective.forward_step, rows, objective.after_gradients)

    return {
        "gpt": gpt,
        "full_head": ours("full"),
        "masked_head": ours("masked"),
        "causal": causal,
    }


def interleave(
    steps: dict[str, Callable[[], None]], window: int, rounds: int, device: str
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Lets sides take turns.

    In a multiple of as many rounds as there are sides each comes first, second and so on equally
    often.

    Args:
        steps: a step of each side.
        window: steps of a side in a round.
        rounds: number of measurements.
        device: `cuda` or `cpu`.

    Returns:
        For each side the seconds of a step in every round, and the median of the most bytes that
        a step takes, None where nothing says it.
    """
    sides = list(steps)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    peaks: dict[str, list[int | None]] = {side: [] for side in sides}
    for round_ in range(-1, rounds):  # the first one warms up
        first = round_ % len(sides)
        for side in (*sides[first:], *sides[:first]):
            spent = seconds_of(partial(_repeat, steps[side], window), device)
            if round_ >= 0:
                seconds[side].append(spent / window)
    for _ in range(3):  # apart, since it sends freed memory back to the system
        for side in sides:
            peaks[side].append(time_and_peak_memory(steps[side], device)[1])
    return seconds, {
        side: None if None in values else statistics.median(values)
        for side, values in peaks.items()
    }


def _repeat(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()


def speed_ratios(seconds: dict[str, list[float]], reference: str) -> dict[str, dict[str, Any]]:
    """Tokens/s of each side relative to a reference: median and quartiles over the rounds.

    Args:
        seconds: see `interleave`.
        reference: one of its sides.
    """
    return {
        side: quartiles([r / x for r, x in zip(seconds[reference], values, strict=True)])
        for side, values in seconds.items()
    }
