"""The sides of two benchmarks: kinds of training steps that alternate on one model.

`gpt` is a step with Megatron's next-token loss over GPTDataset. `full_head` and `masked_head` are
steps with this objective, with logits at all positions and at masked ones. Each is a whole training
step of Megatron with data, loss checks and optimizer. These three use the same model and attend to
all positions, so the comparison is between objectives only. `causal` is GPT with its usual causal
attention. Causal attention is slower on a CPU, where the local layers apply a mask, and faster on a
GPU, where fused kernels skip masked scores.

`blocks` is a step of block diffusion, whose rows hold every token twice. `gpt_2x` is GPT on rows of
twice the length, so it has as many positions, attends to all of them, and has logits at all of
them.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.python_text import MASK
from benchmarks.timing import quartiles, seconds_of, time_and_peak_memory

MEGATRON_SIDES = ("gpt", "full_head", "masked_head", "causal")
BLOCK_SIDES = ("blocks", "gpt_2x")
LLADA_VOCABULARY = 126_464
SIZES = ("layers", "hidden", "heads", "rows", "length")


def ffn_size(hidden: int, device: str) -> int:
    """Returns Llama's feed-forward width, 8/3 of the hidden size.

    It is rounded up to a multiple of 32, and on CUDA of 128: multiples of 128 fill the tiles of
    matrix products, and blockwise FP8 has scales for blocks of 128.
    """
    multiple = 128 if device == "cuda" else 32
    return -(-hidden * 8 // 3 // multiple) * multiple


def model_flags(sizes: dict[str, int], vocabulary: int, device: str) -> list[str]:
    """Returns Megatron's flags for a Llama-like model, its rows and its optimizer.

    Args:
        sizes: the size of each of `SIZES`.
        vocabulary: number of rows of the output layer.
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


def megatron_steps(
    session: Any, block_size: int | None = None
) -> tuple[dict[str, Callable[[], None]], dict[str, Callable[[], object]]]:
    """Returns a training step for each of `MEGATRON_SIDES`, and with blocks of `BLOCK_SIDES`.

    For the sides of this objective the second dictionary has the part of a step before the model:
    rows with their quantiles, masks, and the attention mask of blocks.

    Args:
        session: a `session.Session`, whose flags have --mdm-block-size if there are blocks.
        block_size: tokens in a block; None: no blocks.
    """
    from megatron.core.distributed import finalize_model_grads

    from benchmarks.causal import causal_datasets, causal_forward_step
    from megatron_mdm.mcore.model.causal import causal_attention
    from megatron_mdm.mcore.training.forward_step import prepare

    def next_tokens(rows: Any) -> Callable[[], None]:
        return lambda: session.step(causal_forward_step, rows, finalize_model_grads)

    gpt = next_tokens(session.rows(causal_datasets))

    def causal() -> None:
        with causal_attention(session.model[0]):
            gpt()

    steps: dict[str, Callable[[], None]] = {"gpt": gpt}
    preparations: dict[str, Callable[[], object]] = {}

    def add_ours(side: str, **settings: Any) -> None:
        objective = session.objective_with(**settings)
        rows = session.rows(objective.datasets_provider)
        steps[side] = lambda: session.step(objective.forward_step, rows, objective.after_gradients)
        preparations[side] = lambda: prepare(objective.state, rows, session.model[0])

    add_ours("full_head", head="full")
    add_ours("masked_head")
    steps["causal"] = causal
    if block_size is not None:
        add_ours("blocks", block_size=block_size)
        session.args.seq_length *= 2  # for the data set alone
        steps["gpt_2x"] = next_tokens(session.rows(causal_datasets))
        session.args.seq_length //= 2
    return steps, preparations


def interleave(
    steps: dict[str, Callable[[], None]], window: int, rounds: int, device: str
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Runs the steps of several sides alternately and measures them.

    If the number of rounds is a multiple of the number of sides, each side comes first, second and
    so on equally often.

    Args:
        steps: a step of each side.
        window: steps of each side in a round.
        rounds: number of rounds.
        device: `cuda` or `cpu`.

    Returns:
        For each side the seconds of a step in every round, and the median of a step's peak memory
        in bytes, None if it cannot be measured.
    """
    sides = list(steps)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    peaks: dict[str, list[int | None]] = {side: [] for side in sides}
    for round_ in range(-1, rounds):  # round -1 is a warm-up
        first = round_ % len(sides)
        for side in (*sides[first:], *sides[:first]):
            spent = seconds_of(partial(_repeat, steps[side], window), device)
            if round_ >= 0:
                seconds[side].append(spent / window)
    for _ in range(3):  # not in the timed rounds: it returns freed memory to the system
        for side in sides:
            peaks[side].append(time_and_peak_memory(steps[side], device)[1])
    return seconds, {side: _median(values) for side, values in peaks.items()}


def _median(peaks: list[int | None]) -> float | None:
    """Returns the median, None if a value is not known."""
    known = [peak for peak in peaks if peak is not None]
    return statistics.median(known) if len(known) == len(peaks) else None


def _repeat(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()


def speed_ratios(seconds: dict[str, list[float]], reference: str) -> dict[str, dict[str, Any]]:
    """Returns tokens/s of each side relative to a reference: median and quartiles over rounds.

    Args:
        seconds: seconds of each side, from `interleave`.
        reference: one of these sides.
    """
    return {
        side: quartiles([r / x for r, x in zip(seconds[reference], values, strict=True)])
        for side, values in seconds.items()
    }
