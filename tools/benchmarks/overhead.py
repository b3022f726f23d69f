"""Tokens/s and peak memory of this objective against Megatron's own GPT objective, on one rank.

One model and one optimizer in one process are trained in turns: a step with Megatron's next-token
loss over its GPTDataset, one with this objective and the head at all positions, one with the head
at masked positions, and so on, each a whole training step of Megatron's with its data, its loss
checks and its optimizer; the data are loaded in the process itself, so that their cost counts. The
model is the same, attention included: `gpt` attends to all positions as well, since what is
compared is the objective. A last side, `causal`, is GPT with the causal attention that it really
has, which the local layers on a CPU pay for with a mask, and fused kernels on a GPU turn to profit.

On CUDA in bfloat16 with Transformer Engine if there is a GPU, else on the CPU in float32. Time is
the clock's on CUDA, and on the CPU that of the processor, which other work on the machine disturbs
less. Ratios are medians over rounds, in each of which all sides take a window of steps. In a
multiple of as many rounds as there are sides each comes first, second and so on equally often. Peak
memory is that of a step beyond weights, gradients and the optimizer's state, which all sides have.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from benchmarks.race import MASK, write_data
from benchmarks.timing import device_name, measured, seconds_of, spread
from megatron_mdm.environment import prepare_environment
from megatron_mdm.errors import UserError, check_numbers
from megatron_mdm.files import write_json

DESCRIPTION = "tokens/s and memory of a training step against Megatron's GPT objective"
SIDES = ("gpt", "full_head", "masked_head", "causal")
SIZES = {
    "cpu": {"layers": 4, "hidden": 128, "heads": 4, "rows": 8, "length": 128},
    "cuda": {"layers": 12, "hidden": 1024, "heads": 16, "rows": 8, "length": 2048},
}
LLADA_VOCABULARY = 126_464
OPTIONS = {
    "layers": "of the model",
    "hidden": "size",
    "heads": "of attention",
    "rows": "in a batch, one micro-batch",
    "length": "of a row",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    parser.add_argument(
        "--vocabulary",
        type=int,
        default=LLADA_VOCABULARY,
        metavar="N",
        help="size (default: %(default)s, LLaDA's)",
    )
    for name, text in OPTIONS.items():
        default = ", ".join(f"{sizes[name]} on {device}" for device, sizes in SIZES.items())
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--window", type=int, default=1, metavar="N", help="steps of a side in a round (default: 1)"
    )
    # A multiple of the sides here and in `baseline`.
    parser.add_argument("--rounds", type=int, default=12, metavar="N", help="default: %(default)s")


def run(args: argparse.Namespace) -> None:
    """Measures, prints a table, and writes `args.json` if it is set.

    Raises:
        UserError: a size that cannot work.
    """
    check(args)
    device = use_device()
    sizes = sizes_of(args, device)
    with tempfile.TemporaryDirectory() as directory, redirect_stdout(sys.stderr):
        results = measure(
            device, pathlib.Path(directory), sizes, args.vocabulary, args.window, args.rounds
        )
    print(_table(results))
    if args.json:
        write_json(args.json, results)


def check(args: argparse.Namespace) -> None:
    """Checks what `add_arguments` added.

    Raises:
        UserError: a size that cannot work.
    """
    check_numbers(args, *OPTIONS, "window", "rounds")
    if args.vocabulary <= MASK:
        raise UserError(f"--vocabulary {args.vocabulary}: must be above {MASK}, bytes and mask")


def sizes_of(args: argparse.Namespace, device: str) -> dict[str, int]:
    """The value of each of `OPTIONS`, given or the default of the device.

    Raises:
        UserError: heads of no size that a rotary embedding can turn.
    """
    sizes = {name: getattr(args, name) or SIZES[device][name] for name in OPTIONS}
    if sizes["hidden"] % (2 * sizes["heads"]):
        raise UserError(
            f"--hidden {sizes['hidden']}: must be a multiple of 2 x --heads {sizes['heads']}"
        )
    return sizes


def use_device() -> str:
    """Prepares this process for Megatron on the GPU if there is one, or else on the CPU."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    prepare_environment(device)
    return device


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
        sizes: see `OPTIONS`.
        vocabulary: rows of the output layer.
        device: `cuda` or `cpu`.
    """
    layers, hidden, heads, rows, length = (sizes[name] for name in OPTIONS)
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


def measure(
    device: str,
    directory: pathlib.Path,
    sizes: dict[str, int],
    vocabulary: int,
    window: int,
    rounds: int,
) -> dict[str, Any]:
    """Times and peaks of all sides.

    Args:
        device: `cuda` or `cpu`.
        directory: for the data.
        sizes: see `OPTIONS`.
        vocabulary: rows of the output layer.
        window: steps of a side in a round.
        rounds: number of measurements.
    """
    import torch

    from megatron_mdm.mcore.device import training_device

    write_data(directory)
    flags = [
        *model_flags(sizes, vocabulary, device),
        *f"--data-path {directory / 'text'} --data-cache-path {directory / 'cache'}".split(),
    ]
    with training_device(device):
        from benchmarks.session import training_session

        with training_session(flags) as session:
            steps = _steps(session)
            seconds, peaks = interleave(steps, window, rounds, device)
            parameters = sum(p.numel() for chunk in session.model for p in chunk.parameters())
    ratios = {
        side: spread([gpt / x for gpt, x in zip(seconds["gpt"], seconds[side], strict=True)])
        for side in SIDES[1:]
    }
    tokens = sizes["rows"] * sizes["length"]
    return {
        "benchmark": "overhead",
        "device": device_name(device),
        "clock": "wall" if device == "cuda" else "processor time of the process",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **sizes,
        "vocabulary": vocabulary,
        "parameters": parameters,
        "window": window,
        "tokens_per_s_ratio_full_head": ratios["full_head"]["median"],
        "tokens_per_s_ratio_masked_head": ratios["masked_head"]["median"],
        "tokens_per_s_ratios": ratios,
        "sides": {
            side: {
                "tokens_per_s": tokens / statistics.median(seconds[side]),
                "seconds": seconds[side],
                "peak_bytes": peaks[side],
            }
            for side in SIDES
        },
        **{
            f"peak_memory_ratio_{side}": None
            if peaks["gpt"] is None
            else peaks[side] / peaks["gpt"]
            for side in SIDES[1:3]
        },
    }


def _steps(session: Any) -> dict[str, Callable[[], None]]:
    """A training step of each side, with rows of its own."""
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
            spent = seconds_of(lambda side=side: _repeat(steps[side], window), device)
            if round_ >= 0:
                seconds[side].append(spent / window)
    for _ in range(3):  # apart, since it sends freed memory back to the system
        for side in sides:
            peaks[side].append(measured(steps[side], device)[1])
    return seconds, {
        side: None if None in values else statistics.median(values)
        for side, values in peaks.items()
    }


def _repeat(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()


def _table(results: dict[str, Any]) -> str:
    lines = [
        f"{results['layers']} layers of {results['hidden']}, vocabulary {results['vocabulary']}, "
        f"{results['rows']} rows of {results['length']}, {results['device']}, threads "
        f"{results['threads']}; {results['clock']}",
        f"{'':14}{'tokens/s':>10}{'ratio':>8}{'quartiles':>16}{'peak MB':>10}{'ratio':>8}",
    ]
    gpt = results["sides"]["gpt"]
    for side, values in results["sides"].items():
        line = f"{side.replace('_', ' '):14}{values['tokens_per_s']:>10.0f}"
        if side == "gpt":
            line += f"{1:>8.3f}{'':16}"
        else:
            ratio = results["tokens_per_s_ratios"][side]
            quartiles = "{:.3f} - {:.3f}".format(*ratio["quartiles"])
            line += f"{ratio['median']:>8.3f}{quartiles:>16}"
        if values["peak_bytes"] is not None:
            peak = values["peak_bytes"]
            line += f"{peak / 1e6:>10.0f}{peak / gpt['peak_bytes']:>8.2f}"
        lines.append(line)
    return "\n".join(lines)
