"""Measures tokens/s, TFLOP/s and MFU on one GPU, in BF16 and FP8, against Megatron's GPT objective.

For each model size and precision, a separate process runs whole training steps of Megatron, with
data and optimizer. The steps alternate between four sides (see sides.py): `gpt`, Megatron's
next-token objective with attention to all positions; `full_head` and `masked_head`, this objective
with logits at all positions and at masked ones; `causal`, GPT with its causal attention.

    MFU = useful FLOPs per token x tokens/s / dense peak FLOP/s of the GPU

Useful FLOPs are three times the matrix products of a forward pass (see sizing/flops.py). For both
heads of this objective only the logits at masked positions, half of all positions, are useful.
Recomputed and padded work does not count. The peak is that of the layers' precision. In FP8,
attention and output layer stay in BF16, but the peak is FP8's: compare BF16 and FP8 by tokens/s,
not by MFU.

By default the last size is the largest of the list that fits with Adam in all requested precisions.
A size whose weights, gradients and moments alone exceed the memory is not tried. With --sizes only
the given sizes are measured. Each measurement is written to the file at once, before its profile. A
failed measurement is recorded as failed, and the next call tries it again. A call does not start a
measurement that may not end within --minutes. The same command continues; --precisions and --sizes
may then name more.

This process does not use the GPU, so that each measurement has all of the GPU's memory. Separate
processes find the devices and measure.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import pathlib
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from typing import Any

from benchmarks.python_text import write_data
from benchmarks.sides import (
    LLADA_VOCABULARY,
    MEGATRON_SIDES,
    ffn_size,
    interleave,
    megatron_steps,
    model_flags,
    speed_ratios,
)
from benchmarks.timing import device_name, seconds_of
from megatron_mdm.environment import prepare_environment
from megatron_mdm.errors import UserError, check_numbers
from megatron_mdm.experiments.program import program
from megatron_mdm.files import write_json
from megatron_mdm.sizing.flops import ModelShape, mfu
from megatron_mdm.sizing.memory import layer_bytes_per_token

DESCRIPTION = "tokens/s and MFU on one GPU, BF16 and FP8, against Megatron's GPT objective"
# `rows` are the rows of a micro-batch; large models accumulate several micro-batches in a step.
SIZES: dict[str, dict[str, int]] = {
    "0.5B": {"layers": 24, "hidden": 1024, "heads": 16, "rows": 4, "micro_batches": 2},
    "1B": {"layers": 22, "hidden": 1536, "heads": 12, "rows": 4, "micro_batches": 2},
    "7B": {"layers": 28, "hidden": 4096, "heads": 32, "rows": 1, "micro_batches": 8},
    "6B": {"layers": 24, "hidden": 4096, "heads": 32, "rows": 1, "micro_batches": 8},
    "5B": {"layers": 20, "hidden": 4096, "heads": 32, "rows": 1, "micro_batches": 8},
    "3.5B": {"layers": 24, "hidden": 3072, "heads": 24, "rows": 1, "micro_batches": 8},
    "2.7B": {"layers": 26, "hidden": 2560, "heads": 20, "rows": 1, "micro_batches": 8},
}
LARGEST = ("7B", "6B", "5B", "3.5B", "2.7B")  # the first size that fits is measured
# Bytes of a parameter with Adam in bfloat16, on one rank: see sizing/memory.py.
STATE_BYTES = 6 + 12
# Bytes of a logit if the head works at all positions: bfloat16 from the output layer, float32 in
# Megatron's fused cross entropy, and float32 for the exponentials, since torch.compile may not
# write them in place.
LOGIT_BYTES = 2 + 4 + 4
LENGTH = 4096
TINY = {
    "tiny": {"layers": 1, "hidden": 32, "heads": 2, "rows": 2, "micro_batches": 1},
    "small": {"layers": 2, "hidden": 32, "heads": 2, "rows": 2, "micro_batches": 2},
}
FP8 = "--fp8-format hybrid --fp8-recipe".split()
PRECISIONS = {
    "bf16": [],  # on a CPU this is float32
    "tensorwise": [*FP8, "tensorwise"],
    "blockwise": [*FP8, "blockwise"],
    "delayed": [*FP8, *"delayed --fp8-amax-history-len 1024 --fp8-amax-compute-algo max".split()],
}
DEFAULT_PRECISIONS = ("bf16", "tensorwise", "blockwise")
# Files that a measurement writes.
RESULT, PROFILE = "result.json", "profile.txt"
POLL = 0.2  # seconds between checks for these files
# Dense peaks from NVIDIA's data sheets, in TFLOP/s: (part of the device's name, BF16, FP8).
PEAKS = (("H100 PCIe", 756, 1513), ("H100", 989, 1979), ("H200", 989, 1979), ("A100", 312, 0))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--json", metavar="FILE", required=True, help="file of the results")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        help=f"precisions to measure (default: those of {' '.join(DEFAULT_PRECISIONS)} that the "
        "GPU and Transformer Engine support)",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=[*SIZES, *TINY],
        metavar="SIZE",
        help=f"sizes to measure: {', '.join(SIZES)}; with --tiny: {', '.join(TINY)} (default: "
        "0.5B, 1B and the largest that fits)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=8,
        metavar="N",
        help=f"steps of each side, a multiple of {len(MEGATRON_SIDES)} (default: 8)",
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, metavar="M", help="time limit of a call (default: 9)"
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        nargs=2,
        metavar=("BF16", "FP8"),
        help="dense peak of the GPU (default: known for H100, H200 and A100)",
    )
    parser.add_argument(
        "--flags", default="", metavar="TEXT", help="more Megatron flags, for all sides"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="for the measurements of this call, append the kernels that take the most time in a "
        "step of each side to FILE.profile.txt",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="two tiny models, also on a CPU: a test of the program"
    )


def run(args: argparse.Namespace) -> None:
    """Makes the missing measurements, prints a table, and writes `args.json` after each one.

    Raises:
        UserError: there is no GPU, a setting is not possible, or (at the end) a measurement failed.
    """
    start = time.monotonic()
    check_numbers(args, "rounds")
    if args.rounds % len(MEGATRON_SIDES):
        raise UserError(
            f"--rounds {args.rounds}: must be a multiple of {len(MEGATRON_SIDES)}, so that each "
            "side comes first, second and so on equally often"
        )
    known = TINY if args.tiny else SIZES
    for name in args.sizes or ():
        if name not in known:
            tiny = "with" if args.tiny else "without"
            raise UserError(f"--sizes {name}: {tiny} --tiny the sizes are {', '.join(known)}")
            # Different numbers of masked positions in micro-batches would fragment the allocator's
            # memory.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name: the user's own setting
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    machine = _machine(asks_library=args.precisions is None)
    device = machine["kind"]
    if device == "cpu" and not args.tiny:
        raise UserError("no CUDA device was found: on a CPU only --tiny runs")
    if device == "cpu" and set(args.precisions or ()) - {"bf16"}:
        raise UserError("--precisions: FP8 needs a GPU; give bf16, which is float32 on a CPU")
    precisions = args.precisions or machine["precisions"]
    about = header(machine, args)
    results = _earlier(args.json, about)
    done, longest = results["measurements"], 0.0
    sizes = [name for name in known if name in (args.sizes or known)]
    for name, precision in [(s, p) for s in sizes for p in precisions]:
        searched = precisions if args.sizes is None else None
        if not _is_missing(name, precision, searched, done, machine["memory"]):
            continue
        spent = time.monotonic() - start
        if spent + 1.3 * longest > 60 * args.minutes and longest:
            print("time is up: run the same command again to continue", file=sys.stderr)
            break
        before = time.monotonic()
        patience = 60 * args.minutes - spent
        keep = functools.partial(_keep, args.json, results, f"{name} {precision}")
        profile = _in_a_process(name, precision, about, device, args.profile, patience, keep)
        longest = max(longest, time.monotonic() - before)
        if profile is not None:
            with open(f"{args.json}.profile.txt", "a", encoding="utf-8") as file:
                file.write(f"{name} {precision}\n\n{profile}\n")
    print(_table(results, args.peak_tflops or _peaks(about["device"])))
    failed = [key for key, measurement in done.items() if "failed" in measurement]
    if failed:
        raise UserError(f"{', '.join(failed)} failed, see {args.json}; run the command again")


def _keep(path: str, results: dict[str, Any], key: str, measurement: dict[str, Any]) -> None:
    results["measurements"][key] = measurement
    results["date"] = time.strftime("%Y-%m-%d", time.gmtime())
    write_json(path, results)


def header(machine: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Returns the description of the results: device, versions and settings.

    Args:
        machine: see `_machine`.
        args: arguments of the command.
    """
    return {
        "benchmark": "gpu",
        "device": machine["device"],
        "torch": machine["torch"],
        "megatron": version("megatron-core"),
        "program": program(),
        "length": 64 if args.tiny else LENGTH,
        "vocabulary": 1024 if args.tiny else LLADA_VOCABULARY,
        "rounds": args.rounds,
        "flags": args.flags,
        "command": " ".join(["tools/benchmark.py", *sys.argv[1:]]),
    }


@functools.cache  # the machine does not change during the process
def _machine(asks_library: bool) -> dict[str, Any]:
    """Describes this machine's device, in a separate process.

    Args:
        asks_library: whether to import Transformer Engine as well, which takes seconds.

    Returns:
        `kind`, `cuda` or `cpu`; `device`, its name; `memory`, its bytes, None on a CPU; `torch`,
        the version of torch; `precisions`, those of `DEFAULT_PRECISIONS` that can be measured.

    Raises:
        UserError: the process failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "machine.json")
        process = _start(_describe, asks_library, str(path))
        process.join()
        if not path.exists():
            raise UserError(
                "the process that asks torch for devices failed with exit status "
                f"{process.exitcode}"
            )
        return json.loads(path.read_text(encoding="utf-8"))


def _describe(asks_library: bool, path: str) -> None:
    """Writes what `_machine` returns."""
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    properties = torch.cuda.get_device_properties() if kind == "cuda" else None
    can = {"bf16": True}
    if asks_library and kind == "cuda" and find_spec("transformer_engine"):
        import transformer_engine.pytorch as te

        can["tensorwise"] = te.is_fp8_available()
        can["blockwise"] = te.is_fp8_block_scaling_available()
    machine = {
        "kind": kind,
        "device": device_name(kind),
        "memory": properties and properties.total_memory,
        "torch": torch.__version__,
        "precisions": [name for name in DEFAULT_PRECISIONS if can.get(name)],
    }
    write_json(path, machine)


def _start(target: Callable[..., None], *args: Any) -> BaseProcess:
    """Runs a function of this module in a new process, which frees the GPU when it ends."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    return process


def _earlier(path: str, about: dict[str, Any]) -> dict[str, Any]:
    """Reads the results so far.

    Raises:
        UserError: the file holds results of another program, device or setting.
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


def _is_missing(
    name: str,
    precision: str,
    precisions: list[str] | None,
    done: dict[str, Any],
    memory: int | None,
) -> bool:
    """Whether a measurement has to be made.

    Args:
        name: name of a size.
        precision: the precision.
        precisions: all requested precisions, in all of which the largest size has to fit; None:
            the size was requested by name and is measured in any case.
        done: measurements so far.
        memory: memory of the device in bytes; None: not known.
    """
    ran_out = "out_of_memory" in done.get(f"{name} bf16", {})  # FP8 needs more memory
    settled = "failed" not in done.get(f"{name} {precision}", {"failed": "not measured"})
    if settled or ran_out:
        return False
    if precisions is None or name not in LARGEST:
        return True
    larger = LARGEST[: LARGEST.index(name)]
    fits = (all("sides" in done.get(f"{x} {p}", {}) for p in precisions) for x in larger)
    too_large = memory and STATE_BYTES * num_parameters(name) > memory
    return not (too_large or any(fits))


def num_parameters(name: str) -> int:
    """Returns the number of parameters of one of `SIZES`."""
    return _shape(name).num_parameters


def expected_bytes(name: str) -> int:
    """Estimates the peak GPU memory of one of `SIZES`, with logits at all positions.

    The estimate has weights, gradients, moments, the activations of a micro-batch, and its logits;
    see sizing/memory.py. The CUDA context and workspaces are not included. With 8 rows in a
    micro-batch, 0.5B would take 78 of the 80 GB of an H100, and would have more than 2^31 logits,
    for which kernels with 32-bit indices fail. With 4 rows it takes 44 GB and has 2.07e9 logits.
    """
    shape, tokens = _shape(name), SIZES[name]["rows"] * LENGTH
    layers = tokens * shape.num_layers * layer_bytes_per_token(shape)
    logits = tokens * shape.vocab_size * LOGIT_BYTES
    return STATE_BYTES * shape.num_parameters + layers + logits


def _shape(name: str) -> ModelShape:
    size = SIZES[name]
    return ModelShape(
        num_layers=size["layers"],
        hidden_size=size["hidden"],
        ffn_hidden_size=ffn_size(size["hidden"], "cuda"),
        num_attention_heads=size["heads"],
        vocab_size=LLADA_VOCABULARY,
        seq_length=LENGTH,
    )


def _in_a_process(
    name: str,
    precision: str,
    about: dict[str, Any],
    device: str,
    profile: bool,
    patience: float,
    keep: Callable[[dict[str, Any]], None],
) -> str | None:
    """Runs a measurement in a new process, so that Megatron's global state starts empty.

    Args:
        name: name of a size.
        precision: one of `PRECISIONS`.
        about: see `header`.
        device: `cuda` or `cpu`.
        profile: whether to profile a step of each side after the measurement.
        patience: seconds after which the process is ended.
        keep: called with the measurement as soon as it is there, or with the reason of a failure
            under `failed`.

    Returns:
        The profile, or the reason why there is none; None if no profile was requested or nothing
        was measured.
    """
    print(f"{name} in {precision} ...", file=sys.stderr, flush=True)
    deadline, measured = time.monotonic() + patience, None
    with tempfile.TemporaryDirectory() as directory:
        result, profiled = (pathlib.Path(directory, file) for file in (RESULT, PROFILE))
        process = _start(_measure, name, precision, about, device, profile, directory)
        while process.is_alive() and measured is None and time.monotonic() < deadline:
            process.join(POLL)
            measured = json.loads(result.read_text("utf-8")) if result.exists() else None
        keep(measured or {"failed": _end(process, deadline)})
        ended = _end(process, deadline)  # a profile may have followed
        if not profile or "sides" not in (measured or {}):
            return None
        return profiled.read_text("utf-8") if profiled.exists() else f"no profile: {ended}\n"


def _end(process: BaseProcess, deadline: float) -> str:
    """Waits for a process until a deadline, then kills it; returns how it ended."""
    process.join(max(0.0, deadline - time.monotonic()))
    if process.is_alive():
        process.kill()
        process.join()
        return "it took longer than --minutes"
    return f"exit status {process.exitcode}"


def _measure(
    name: str, precision: str, about: dict, device: str, profile: bool, directory: str
) -> None:
    """Runs in a new process: writes the measurement, then the profile, into a directory."""
    prepare_environment(device)
    from megatron_mdm.mcore.device import training_device

    sizes = {**(SIZES | TINY)[name], "length": about["length"]}
    write_data(pathlib.Path(directory))
    flags = [
        *model_flags(sizes, about["vocabulary"], device),
        *("--data-path", f"{directory}/text", "--data-cache-path", f"{directory}/cache"),
        *f"--global-batch-size {sizes['rows'] * sizes['micro_batches']}".split(),
        *PRECISIONS[precision],
        *shlex.split(about["flags"]),
    ]
    result = os.path.join(directory, RESULT)
    try:
        with redirect_stdout(sys.stderr), training_device(device):
            from benchmarks.session import training_session

            with training_session(flags) as session:
                steps, _ = megatron_steps(session)
                measured = _sides(session, steps, about["rounds"], device)
                write_json(result, {**sizes, **measured})
                if profile:
                    seconds = {side: x["seconds"] for side, x in measured["sides"].items()}
                    text = _profiles(steps, seconds, device)
                    pathlib.Path(directory, PROFILE).write_text(text, encoding="utf-8")
    except Exception as error:  # of any library: it is reported, and other measurements go on
        traceback.print_exc()
        why = f"{type(error).__name__}: {error}"
        if os.path.exists(result):  # what followed the times has failed
            text = f"no profile: {why}\n"
            pathlib.Path(directory, PROFILE).write_text(text, encoding="utf-8")
        elif any(reason in str(error) for reason in ("out of memory", "ALLOC_FAILED")):
            write_json(result, {**sizes, "out_of_memory": True})
        else:
            write_json(result, {**sizes, "failed": why})


def _sides(
    session: Any, steps: dict[str, Callable[[], None]], rounds: int, device: str
) -> dict[str, Any]:
    """Times, peaks and useful FLOPs of all sides of one model."""
    import torch

    args = session.args
    seconds, peaks = interleave(steps, 1, rounds, device)
    resting = torch.cuda.memory_allocated() if device == "cuda" else None
    ratios = speed_ratios(seconds, "gpt")
    shape = ModelShape.from_args(args)
    tokens = args.global_batch_size * args.seq_length
    return {
        "parameters": shape.num_parameters,
        "resting_bytes": resting,  # weights, gradients and the optimizer's state
        "sides": {
            side: {
                "tokens_per_s": tokens / statistics.median(seconds[side]),
                "ratio_to_gpt": ratios[side],
                "useful_flops_per_token": shape.training_flops(
                    head_fraction=0.5 if side.endswith("head") else 1.0, causal=side == "causal"
                ),
                "peak_bytes": peaks[side],
                "seconds": seconds[side],
            }
            for side in MEGATRON_SIDES
        },
    }


def _profiles(steps: dict[str, Callable[[], None]], seconds: dict, device: str) -> str:
    """Returns tables of the time that a step of each side spends in each kernel on the device."""
    from torch.profiler import ProfilerActivity, profile

    kind = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    text = ""
    for side, step in steps.items():
        with profile(activities=[kind]) as profiler:
            seconds_of(step, device)
        table = profiler.key_averages().table(
            sort_by=f"self_{device}_time_total", row_limit=25, max_name_column_width=100
        )
        text += f"{side}, a step takes {statistics.median(seconds[side]):.4f} s\n{table}\n"
    return text


def _peaks(device: str) -> tuple[float, float] | None:
    """Returns the peak TFLOP/s of a device in BF16 and FP8; None if they are not known."""
    return next(((bf16, fp8) for name, bf16, fp8 in PEAKS if name in device), None)


def _table(results: dict[str, Any], peaks: tuple[float, float] | None) -> str:
    lines = [
        f"{results['device']}, rows of {results['length']}, vocabulary {results['vocabulary']}",
        f"{'size':6}{'precision':>11}{'side':>13}{'tokens/s':>10}{'to gpt':>8}{'to bf16':>8}"
        f"{'TFLOP/s':>9}{'MFU':>7}{'step GB':>9}{'in all':>8}",
    ]
    for key, measurement in results["measurements"].items():
        name, precision = key.split()
        if "sides" not in measurement:
            why = measurement.get("failed", "out of memory").split("\n")[0]
            lines.append(f"{name:6}{precision:>11} {why}")
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
            peak, resting = values["peak_bytes"], measurement["resting_bytes"]
            line += "" if peak is None else f"{peak / 1e9:>9.2f}"
            line += "" if resting is None else f"{(peak + resting) / 1e9:>8.2f}"
            lines.append(line)
    return "\n".join(lines)
