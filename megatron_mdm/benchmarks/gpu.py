"""Tokens/s, TFLOP/s and MFU on one GPU, in BF16 and FP8, against Megatron's GPT objective.

For each size of model and each precision a process of its own takes whole training steps of
Megatron's, data and optimizer included, in turns: `gpt`, Megatron's next-token objective with
attention to all positions; `full_head` and `masked_head`, this objective with logits at all and at
masked positions; `causal`, GPT as it is. `overhead` explains the sides.

    MFU = FLOPs that are useful, per token, x tokens/s / peak FLOP/s of the GPU, dense

Useful are the matrix products of a forward pass, three times: see benchmarks/flops.py. For both
heads of this objective these are the logits at masked positions, half of all; recomputed or padded
work does not count. The peak is that of the precision of the layers: in FP8, whose attention and
output layer stay in BF16, FP8's, so that the MFU of BF16 and FP8 are not of one measure, while
tokens/s are.

The last size is the largest of the list that fits with Adam. Every measurement is kept in the file
as soon as it is there. A call begins none that may not end before --minutes; the same command then
goes on where it was.
"""

import argparse
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from importlib.metadata import version
from typing import Any

from megatron_mdm.benchmarks.flops import ModelShape, mfu
from megatron_mdm.benchmarks.measuring import device_name, spread
from megatron_mdm.benchmarks.overhead import (
    LLADA_VOCABULARY,
    SIDES,
    _steps,
    in_turns,
    model_flags,
)
from megatron_mdm.benchmarks.race import write_data
from megatron_mdm.data.outputs import write_text
from megatron_mdm.errors import UserError
from megatron_mdm.pretrain import prepare_environment

DESCRIPTION = "tokens/s and MFU on one GPU, BF16 and FP8, against Megatron's GPT objective"
# Rows are those of a micro-batch; large models take several for a step of the optimizer.
SIZES: dict[str, dict[str, int]] = {
    "0.5B": {"layers": 24, "hidden": 1024, "heads": 16, "rows": 8, "micro_batches": 1},
    "1B": {"layers": 22, "hidden": 1536, "heads": 12, "rows": 4, "micro_batches": 2},
    "7B": {"layers": 28, "hidden": 4096, "heads": 32, "rows": 1, "micro_batches": 4},
    "6B": {"layers": 24, "hidden": 4096, "heads": 32, "rows": 1, "micro_batches": 4},
    "5B": {"layers": 20, "hidden": 4096, "heads": 32, "rows": 1, "micro_batches": 4},
    "3.5B": {"layers": 24, "hidden": 3072, "heads": 24, "rows": 1, "micro_batches": 4},
}
LARGEST = ("7B", "6B", "5B", "3.5B")  # the first that fits is measured
LENGTH = 4096
TINY = {
    "tiny": {"layers": 1, "hidden": 32, "heads": 2, "rows": 2, "micro_batches": 1},
    "small": {"layers": 2, "hidden": 32, "heads": 2, "rows": 2, "micro_batches": 2},
}
FP8 = "--fp8-format hybrid --fp8-recipe".split()
PRECISIONS = {
    "bf16": [],  # where there is a GPU
    "delayed": [*FP8, *"delayed --fp8-amax-history-len 1024 --fp8-amax-compute-algo max".split()],
    "tensorwise": [*FP8, "tensorwise"],
    "blockwise": [*FP8, "blockwise"],
}
# Dense peaks of NVIDIA's data sheets, in TFLOP/s: (name in the device's, BF16, FP8).
PEAKS = (("H100 PCIe", 756, 1513), ("H100", 989, 1979), ("H200", 989, 1979), ("A100", 312, 0))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--json", metavar="FILE", required=True, help="keeps the results")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=["bf16", "delayed"],
        help="(default: bf16 delayed)",
    )
    parser.add_argument(
        "--rounds", type=int, default=10, metavar="N", help="steps of a side (default: 10)"
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, metavar="M", help="of a call (default: 9)"
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        nargs=2,
        metavar=("BF16", "FP8"),
        help="of the GPU, dense (default: known for H100, H200 and A100)",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="two tiny models, also on a CPU: shows that it runs"
    )


def run(args: argparse.Namespace) -> None:
    """Measures what is missing, prints a table, and writes `args.json` after each measurement.

    Raises:
        UserError: no GPU, settings that cannot work, or a measurement that failed.
    """
    import torch

    start = time.monotonic()
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: must be at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        raise UserError("no CUDA device was found: --tiny shows on a CPU that it runs")
    if device == "cpu" and set(args.precisions) - {"bf16"}:
        raise UserError("--precisions: FP8 needs a GPU; give bf16, which is float32 on a CPU")
    about = header(device, args)
    results = _earlier(args.json, about)
    sizes = list(TINY) if args.tiny else list(SIZES)
    longest = 0.0
    for name, precision in [(s, p) for s in sizes for p in args.precisions]:
        done = results["measurements"]
        if f"{name} {precision}" in done or _larger_fits(name, args.precisions, done):
            continue
        spent = time.monotonic() - start
        if spent + 1.3 * longest > 60 * args.minutes and longest:
            print("time is up: the same command goes on", file=sys.stderr)
            break
        before = time.monotonic()
        patience = 60 * args.minutes - spent
        done[f"{name} {precision}"] = _in_a_process(name, precision, about, device, patience)
        longest = max(longest, time.monotonic() - before)
        results["date"] = time.strftime("%Y-%m-%d", time.gmtime())
        write_text(args.json, json.dumps(results, indent=2) + "\n")
    print(_table(results, args.peak_tflops or _peaks(about["device"])))


def header(device: str, args: argparse.Namespace) -> dict[str, Any]:
    """What the figures are of, beside the measurements themselves."""
    import torch

    return {
        "benchmark": "gpu",
        "device": device_name(device),
        "torch": torch.__version__,
        "megatron": version("megatron-core"),
        "length": 64 if args.tiny else LENGTH,
        "vocabulary": 1024 if args.tiny else LLADA_VOCABULARY,
        "rounds": args.rounds,
        "command": " ".join(["tools/benchmark.py", *sys.argv[1:]]),
    }


def _earlier(path: str, about: dict[str, Any]) -> dict[str, Any]:
    """The results so far.

    Raises:
        UserError: they are of something else.
    """
    if not os.path.exists(path):
        return {**about, "measurements": {}}
    try:
        results = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        differs = [n for n in about if n != "command" and results[n] != about[n]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} does not hold results of this benchmark: remove it") from None
    if differs:
        raise UserError(
            f"{path} has results with another {differs[0]}, {results[differs[0]]}: remove it, or "
            "give another --json"
        )
    return results


def _larger_fits(name: str, precisions: list[str], done: dict[str, Any]) -> bool:
    """Whether a larger one of `LARGEST` was measured in all precisions."""
    larger = LARGEST[: LARGEST.index(name)] if name in LARGEST else ()
    return any(all("sides" in done.get(f"{x} {p}", {}) for p in precisions) for x in larger)


def _in_a_process(
    name: str, precision: str, about: dict[str, Any], device: str, patience: float
) -> dict[str, Any]:
    """A measurement in a process that leaves nothing behind, on the GPU or in Megatron's globals.

    Raises:
        UserError: it failed.
    """
    print(f"{name} in {precision} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as directory:
        process = multiprocessing.get_context("spawn").Process(
            target=_measure, args=(name, precision, about, device, directory)
        )
        process.start()
        process.join(patience)
        if process.is_alive():
            process.kill()
            process.join()
            raise UserError(f"{name} in {precision} took longer than --minutes: give more")
        path = pathlib.Path(directory, "result.json")
        if process.exitcode or not path.exists():
            raise UserError(f"the measurement of {name} in {precision} failed, see above")
        return json.loads(path.read_text(encoding="utf-8"))


def _measure(name: str, precision: str, about: dict, device: str, directory: str) -> None:
    """What a process measures, written to result.json in its directory."""
    prepare_environment(device)
    from megatron_mdm.mcore.device import training_device

    sizes = {**(SIZES | TINY)[name], "length": about["length"]}
    write_data(pathlib.Path(directory))
    flags = [
        *model_flags(sizes, about["vocabulary"], device),
        *f"--data-path {directory}/text --data-cache-path {directory}/cache".split(),
        *f"--global-batch-size {sizes['rows'] * sizes['micro_batches']}".split(),
        *PRECISIONS[precision],
    ]
    with redirect_stdout(sys.stderr), training_device(device):
        from megatron_mdm.benchmarks.training import training_session

        try:
            with training_session(flags) as session:
                result = _sides(session, about["rounds"], device)
        except RuntimeError as error:  # of torch's allocator, or of a library without memory
            if "out of memory" not in str(error) and "ALLOC_FAILED" not in str(error):
                raise
            result = {"out_of_memory": True}
    write_text(os.path.join(directory, "result.json"), json.dumps({**sizes, **result}))


def _sides(session: Any, rounds: int, device: str) -> dict[str, Any]:
    """Times, peaks and useful FLOPs of all sides of one model."""
    args = session.args
    steps = _steps(session)
    seconds, peaks = in_turns(steps, 1, rounds, device)
    shape = ModelShape.from_args(args)
    tokens = args.global_batch_size * args.seq_length
    return {
        "parameters": shape.num_parameters,
        "sides": {
            side: {
                "tokens_per_s": tokens / statistics.median(seconds[side]),
                "ratio_to_gpt": spread(
                    [gpt / x for gpt, x in zip(seconds["gpt"], seconds[side], strict=True)]
                ),
                "useful_flops_per_token": shape.training_flops(
                    head_fraction=0.5 if side.endswith("head") else 1.0, causal=side == "causal"
                ),
                "peak_bytes": peaks[side],
                "seconds": seconds[side],
            }
            for side in SIDES
        },
    }


def _peaks(device: str) -> tuple[float, float] | None:
    """Peak TFLOP/s of a device in BF16 and FP8; None if it is not known."""
    return next(((bf16, fp8) for name, bf16, fp8 in PEAKS if name in device), None)


def _table(results: dict[str, Any], peaks: tuple[float, float] | None) -> str:
    lines = [
        f"{results['device']}, rows of {results['length']}, vocabulary {results['vocabulary']}",
        f"{'size':6}{'precision':>11}{'side':>13}{'tokens/s':>10}{'to gpt':>8}{'to bf16':>8}"
        f"{'TFLOP/s':>9}{'MFU':>7}{'peak GB':>9}",
    ]
    for key, measurement in results["measurements"].items():
        name, precision = key.split()
        if "sides" not in measurement:
            lines.append(f"{name:6}{precision:>11} out of memory")
            continue
        bf16 = results["measurements"].get(f"{name} bf16", {}).get("sides")
        for side, values in measurement["sides"].items():
            rate, flops = values["tokens_per_s"], values["useful_flops_per_token"]
            gain = rate / bf16[side]["tokens_per_s"] if bf16 else math.nan
            line = f"{name:6}{precision:>11}{side:>13}{rate:>10.0f}"
            line += f"{values['ratio_to_gpt']['median']:>8.3f}{gain:>8.2f}"
            line += f"{flops * rate / 1e12:>9.1f}"
            peak = peaks[precision != "bf16"] if peaks else 0
            line += f"{mfu(flops, rate, 1e12 * peak):>7.1%}" if peak else f"{'-':>7}"
            memory = values["peak_bytes"]
            lines.append(line + ("" if memory is None else f"{memory / 1e9:>9.2f}"))
    return "\n".join(lines)
