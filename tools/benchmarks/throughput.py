"""Compares tokens/s and memory of training steps with this objective and others, on one device.

The first of --sides is the reference that the others are compared with:

    gpt            Megatron's next-token objective, with attention to all positions
    full_head      this objective, with logits at all positions
    masked_head    this objective, with logits at masked positions
    causal         Megatron's next-token objective with its causal attention
    blocks         this objective in blocks, with twice as many positions
    gpt_2x         Megatron's next-token objective on rows of twice the length
    hugging_face   a plain training loop on a Hugging Face Llama, by the released recipe of LLaDA

The sides alternate in one process, and all sides except `hugging_face` train the same model: see
sides.py and hugging_face.py. Megatron loads its rows in the process itself, so that the time of
loading counts; the plain loop has its rows in memory. On a GPU the sides train in bfloat16 with
Transformer Engine, on a CPU in float32. Times are wall-clock times on CUDA; on the CPU they are
processor times, which other work on the machine disturbs less. In each round every side takes a
window of steps; ratios are medians over rounds. Tokens of `gpt_2x` count half, so that its ratio is
that of the seconds of a step.

Memory has two parts. `resting_bytes` is the memory of weights, gradients and the optimizer's state,
computed from the number of parameters. `peak_bytes` is the peak memory of a step beyond the memory
before it. All sides keep weights and two moments between steps; Megatron also keeps gradients,
which the plain loop frees.

`share_before_the_model` is the share of a step that this objective spends before the model: rows
with their quantiles, masks, and the attention mask of blocks.
"""

import argparse
import concurrent.futures
import contextlib
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from benchmarks.python_text import MASK, write_data
from benchmarks.sides import (
    BLOCK_SIDES,
    LLADA_VOCABULARY,
    MEGATRON_SIDES,
    interleave,
    megatron_steps,
    model_flags,
    speed_ratios,
)
from benchmarks.timing import device_name, seconds_of
from megatron_mdm.environment import prepare_environment
from megatron_mdm.errors import UserError, check_numbers
from megatron_mdm.files import write_json

DESCRIPTION = "tokens/s and memory of a training step against Megatron's GPT, or a plain loop"
PLAIN = "hugging_face"
SIDES = (*MEGATRON_SIDES, *BLOCK_SIDES, PLAIN)
DEFAULT_SIZES = {
    "cpu": {"layers": 4, "hidden": 128, "heads": 4, "rows": 8, "length": 128},
    "cuda": {"layers": 12, "hidden": 1024, "heads": 16, "rows": 8, "length": 2048},
}
OPTIONS = {
    "layers": "layers of the model",
    "hidden": "hidden size",
    "heads": "attention heads",
    "rows": "rows of a batch, which is one micro-batch",
    "length": "tokens of a row",
}
# Bytes of a parameter between steps. The plain loop keeps weights and two moments in float32.
# Megatron also keeps gradients in float32, and on CUDA weights in bfloat16.
LOOP_BYTES = 12
MEGATRON_BYTES = {"cpu": 16, "cuda": 18}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=SIDES,
        default=list(MEGATRON_SIDES),
        metavar="SIDE",
        help=f"some of {', '.join(SIDES)}; the others are compared with the first (default: "
        f"{' '.join(MEGATRON_SIDES)})",
    )
    parser.add_argument(
        "--block-size",
        type=int,
        default=32,
        metavar="N",
        help="tokens in a block of the side `blocks` (default: %(default)s)",
    )
    parser.add_argument(
        "--vocabulary",
        type=int,
        default=LLADA_VOCABULARY,
        metavar="N",
        help="vocabulary size (default: %(default)s, LLaDA's)",
    )
    for name, text in OPTIONS.items():
        default = ", ".join(f"{sizes[name]} on {device}" for device, sizes in DEFAULT_SIZES.items())
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--window",
        type=int,
        default=1,
        metavar="N",
        help="steps of each side in a round (default: 1)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=12,
        metavar="N",
        help="rounds; a multiple of the number of sides is best (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Measures, prints a table, and writes the file `args.json` if it is given.

    Raises:
        UserError: a size is not possible, or transformers is missing.
    """
    check_numbers(args, *OPTIONS, "window", "rounds", "block_size")
    if args.vocabulary <= MASK:
        raise UserError(f"--vocabulary {args.vocabulary}: must be above {MASK}, for bytes and mask")
    device = use_device()
    if PLAIN in args.sides:
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise UserError(f"{error}: pip install 'megatron-mdm[hf]'") from error
    sizes = sizes_of(args, device)
    sides = list(dict.fromkeys(args.sides))
    with tempfile.TemporaryDirectory() as directory, redirect_stdout(sys.stderr):
        results = measure(
            device,
            pathlib.Path(directory),
            sides,
            sizes,
            args.vocabulary,
            args.window,
            args.rounds,
            args.block_size if {*BLOCK_SIDES} & {*sides} else None,
        )
    print(_table(results))
    if args.json:
        write_json(args.json, results)


def sizes_of(args: argparse.Namespace, device: str) -> dict[str, int]:
    """Returns the value of each of `OPTIONS`: the given one, or the device's default.

    Raises:
        UserError: the head size is odd or not whole, so that there is no rotary embedding for it.
    """
    sizes = {name: getattr(args, name) or DEFAULT_SIZES[device][name] for name in OPTIONS}
    if sizes["hidden"] % (2 * sizes["heads"]):
        raise UserError(
            f"--hidden {sizes['hidden']}: must be a multiple of 2 x --heads {sizes['heads']}"
        )
    return sizes


def use_device() -> str:
    """Prepares this process for Megatron on the GPU if there is one, else on the CPU."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    prepare_environment(device)
    return device


def measure(
    device: str,
    directory: pathlib.Path,
    sides: list[str],
    sizes: dict[str, int],
    vocabulary: int,
    window: int,
    rounds: int,
    block_size: int | None = None,
) -> dict[str, Any]:
    """Measures times and peak memory of all sides.

    Args:
        device: `cuda` or `cpu`.
        directory: directory for the data.
        sides: some of `SIDES`.
        sizes: the size of each of `OPTIONS`.
        vocabulary: number of rows of the output layer.
        window: steps of each side in a round.
        rounds: number of rounds.
        block_size: tokens in a block; None: no side has blocks.
    """
    import torch

    from megatron_mdm.mcore.device import training_device

    write_data(directory)
    flags = [
        *model_flags(sizes, vocabulary, device),
        *("--data-path", f"{directory}/text", "--data-cache-path", f"{directory}/cache"),
    ]
    if block_size is not None:
        flags += ["--mdm-block-size", str(block_size)]
    with contextlib.ExitStack() as stack:
        steps, counts = {}, {}
        if PLAIN in sides:  # before Megatron's CPU mode changes this thread
            steps[PLAIN], counts[PLAIN] = _plain_step(sizes, vocabulary, device, stack)
        stack.enter_context(training_device(device))
        from benchmarks.session import training_session

        session = stack.enter_context(training_session(flags))
        of_megatron, preparations = megatron_steps(session, block_size)
        steps |= of_megatron
        parameters = sum(p.numel() for chunk in session.model for p in chunk.parameters())
        if counts.get(PLAIN, parameters) != parameters:
            raise RuntimeError("the two models differ in their number of parameters")
        seconds, peaks = interleave({side: steps[side] for side in sides}, window, rounds, device)
        before = {
            side: _share_before_the_model(preparations[side], seconds[side], rounds, device)
            for side in sides
            if side in preparations
        }
    reference, *others = sides
    ratios = speed_ratios(seconds, reference)
    resting = {
        side: parameters * (LOOP_BYTES if side == PLAIN else MEGATRON_BYTES[device])
        for side in sides
    }
    memory = {
        side: None if peak is None else {"peak": peak, "memory": resting[side] + peak}
        for side, peak in peaks.items()
    }
    return {
        "benchmark": "throughput",
        "device": device_name(device),
        "clock": "wall" if device == "cuda" else "processor time of the process",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **sizes,
        "vocabulary": vocabulary,
        "parameters": parameters,
        "window": window,
        "block_size": block_size,
        "sides": {
            side: {
                "tokens_per_s": sizes["rows"] * sizes["length"] / statistics.median(seconds[side]),
                "seconds": seconds[side],
                "resting_bytes": resting[side],
                "peak_bytes": peaks[side],
                "share_before_the_model": before.get(side),
            }
            for side in sides
        },
        # Ratios of the other sides to the first one; "memory" is peak plus resting memory.
        "tokens_per_s_ratios": {side: ratios[side] for side in others},
        "peak_ratios": {side: _ratio(memory, side, reference, "peak") for side in others},
        "memory_ratios": {side: _ratio(memory, side, reference, "memory") for side in others},
    }


def _plain_step(
    sizes: dict[str, int], vocabulary: int, device: str, stack: contextlib.ExitStack
) -> tuple[Callable[[], None], int]:
    """Returns a step of the plain loop, and the number of its model's parameters."""
    import torch

    from benchmarks.hugging_face import PlainLoop

    loop = PlainLoop(sizes, vocabulary, device)
    # Megatron's CPU mode makes all torch calls of its own thread a little slower. So the loop runs
    # in another thread.
    own_thread = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))

    def step() -> None:
        tokens = torch.randint(MASK, (sizes["rows"], sizes["length"]))
        own_thread.submit(loop.step, tokens).result()

    return step, sum(parameter.numel() for parameter in loop.model.parameters())


def _share_before_the_model(
    preparation: Callable[[], object], seconds: list[float], rounds: int, device: str
) -> float:
    """Returns the time before the model as a share of that of a step; see `megatron_steps`."""
    spent = [seconds_of(preparation, device) for _ in range(rounds)]
    return statistics.median(spent) / statistics.median(seconds)


def _ratio(memory: dict[str, Any], side: str, reference: str, kind: str) -> float | None:
    if memory[side] is None or memory[reference] is None:
        return None
    return memory[side][kind] / memory[reference][kind]


def _table(results: dict[str, Any]) -> str:
    lines = [
        f"{results['layers']} layers of {results['hidden']}, vocabulary {results['vocabulary']}, "
        f"{results['rows']} rows of {results['length']}, {results['device']}, threads "
        f"{results['threads']}; {results['clock']}",
        f"{'':14}{'tokens/s':>10}{'ratio':>8}{'quartiles':>16}{'step MB':>10}{'ratio':>8}"
        f"{'with rest':>11}{'ratio':>8}{'before model':>14}",
    ]
    for side, values in results["sides"].items():
        line = f"{side.replace('_', ' '):14}{values['tokens_per_s']:>10.0f}"
        speed = results["tokens_per_s_ratios"].get(side)
        line += f"{speed['median'] if speed else 1:>8.3f}"
        line += f"{'{:.3f} - {:.3f}'.format(*speed['quartiles']) if speed else '':>16}"
        peak, resting = values["peak_bytes"], values["resting_bytes"]
        if peak is not None:
            for ratios, size in (("peak_ratios", peak), ("memory_ratios", peak + resting)):
                width = 10 if ratios == "peak_ratios" else 11
                line += f"{size / 1e6:>{width}.0f}{results[ratios].get(side) or 1:>8.2f}"
        if values["share_before_the_model"] is not None:
            line += f"{values['share_before_the_model']:>14.2%}"
        lines.append(line)
    return "\n".join(lines)
