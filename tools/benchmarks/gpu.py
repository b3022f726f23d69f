"""Tokens/s, TFLOP/s and MFU on one GPU, in BF16 and FP8, against Megatron's GPT objective.

For each size of model and each precision a process of its own takes whole training steps of
Megatron's, data and optimizer included, in turns: `gpt`, Megatron's next-token objective with
attention to all positions; `full_head` and `masked_head`, this objective with logits at all and at
masked positions; `causal`, GPT as it is. See sides.py.

    MFU = FLOPs that are useful, per token, x tokens/s / peak FLOP/s of the GPU, dense

Useful are the matrix products of a forward pass, three times: see sizing/flops.py. For both
heads of this objective these are the logits at masked positions, half of all; recomputed or padded
work does not count. The peak is that of the precision of the layers: in FP8, whose attention and
output layer stay in BF16, FP8's, so that the MFU of BF16 and FP8 are not of one measure, while
tokens/s are.

The last size is the largest of the list that fits with Adam, in all precisions asked for; sizes
whose weights, gradients and moments alone are too much are not tried. --sizes takes the sizes that
it names instead. Every measurement is kept in the file as soon as it is there, before its profile
is tried; one that failed is kept as such, and tried again by the next call. A call begins none that
may not end before --minutes; the same command, also with more --precisions or --sizes, then goes on
where it was.

This process never touches the GPU, so that each measurement has all of its memory: processes of
their own measure, and say which devices there are.
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
# Rows are those of a micro-batch; large models take several for a step of the optimizer.
SIZES: dict[str, dict[str, int]] = {
    "0.5B": {"layers": 24, "hidden": 1024, "heads": 16, "rows": 4, "micro_batches": 2},
    "1B": {"layers": 22, "hidden": 1536, "heads": 12, "rows": 4, "micro_batches": 2},
    "7B": {"layers": 28, "hidden": 4096, "heads": 32, "rows": 1, "micro_batches": 8},
    "6B": {"layers": 24, "hidden": 4096, "heads": 32, "rows": 1, "micro_batches": 8},
    "5B": {"layers": 20, "hidden": 4096, "heads": 32, "rows": 1, "micro_batches": 8},
    "3.5B": {"layers": 24, "hidden": 3072, "heads": 24, "rows": 1, "micro_batches": 8},
    "2.7B": {"layers": 26, "hidden": 2560, "heads": 20, "rows": 1, "micro_batches": 8},
}
LARGEST = ("7B", "6B", "5B", "3.5B", "2.7B")  # the first that fits is measured
# Of a parameter under Adam in bfloat16, on one rank: see sizing/memory.py.
STATE_BYTES = 6 + 12
# Of a logit where the head works at all positions: bfloat16 from the output layer, float32 in
# Megatron's fused cross entropy, and as much once more for the exponentials, which torch.compile
# may not write in place.
LOGIT_BYTES = 2 + 4 + 4
LENGTH = 4096
TINY = {
    "tiny": {"layers": 1, "hidden": 32, "heads": 2, "rows": 2, "micro_batches": 1},
    "small": {"layers": 2, "hidden": 32, "heads": 2, "rows": 2, "micro_batches": 2},
}
FP8 = "--fp8-format hybrid --fp8-recipe".split()
PRECISIONS = {
    "bf16": [],  # where there is a GPU
    "tensorwise": [*FP8, "tensorwise"],
    "blockwise": [*FP8, "blockwise"],
    "delayed": [*FP8, *"delayed --fp8-amax-history-len 1024 --fp8-amax-compute-algo max".split()],
}
DEFAULT_PRECISIONS = ("bf16", "tensorwise", "blockwise")
# Files of a measurement.
RESULT, PROFILE = "result.json", "profile.txt"
POLL = 0.2  # seconds between looks at them
# Dense peaks of NVIDIA's data sheets, in TFLOP/s: (name in the device's, BF16, FP8).
PEAKS = (("H100 PCIe", 756, 1513), ("H100", 989, 1979), ("H200", 989, 1979), ("A100", 312, 0))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options."""
    parser.add_argument("--json", metavar="FILE", required=True, help="keeps the results")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        help=f"(default: of {' '.join(DEFAULT_PRECISIONS)} those that the GPU and Transformer "
        "Engine can compute)",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=[*SIZES, *TINY],
        metavar="SIZE",
        help=f"of {', '.join(SIZES)}, or with --tiny {', '.join(TINY)} (default: 0.5B, 1B and the "
        "largest that fits)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=8,
        metavar="N",
        help=f"steps of a side, a multiple of {len(MEGATRON_SIDES)} (default: 8)",
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
        "--flags", default="", metavar="TEXT", help="more of Megatron's flags, for all sides"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="add the kernels that a step of each side spends most time in to FILE.profile.txt, "
        "for what this call measures",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="two tiny models, also on a CPU: shows that it runs"
    )


def run(args: argparse.Namespace) -> None:
    """Measures what is missing, prints a table, and writes `args.json` after each measurement.

    Raises:
        UserError: no GPU, settings that cannot work, or, at the end, a measurement that failed.
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
            raise UserError(f"--sizes {name}: {tiny} --tiny they are {', '.join(known)}")
    # Micro-batches with different numbers of masked positions would leave fragments.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # under the older name, the user's own choice
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    machine = _machine(asks_library=args.precisions is None)
    device = machine["kind"]
    if device == "cpu" and not args.tiny:
        raise UserError("no CUDA device was found: --tiny shows on a CPU that it runs")
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
            print("time is up: the same command goes on", file=sys.stderr)
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
        raise UserError(f"{', '.join(failed)} failed, {args.json} says why: the same command tries")


def _keep(path: str, results: dict[str, Any], key: str, measurement: dict[str, Any]) -> None:
    results["measurements"][key] = measurement
    results["date"] = time.strftime("%Y-%m-%d", time.gmtime())
    write_json(path, results)


def header(machine: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """What the figures are of, beside the measurements themselves.

    Args:
        machine: see `_machine`.
        args: of the command.
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


@functools.cache  # what calls in one process ask again does not change
def _machine(asks_library: bool) -> dict[str, Any]:
    """What this machine has to measure on, asked in a process of its own.

    Args:
        asks_library: whether to ask Transformer Engine, whose import takes seconds, as well.

    Returns:
        `kind`, `cuda` or `cpu`; `device`, its name; `memory`, its bytes, None on a CPU; `torch`,
        the version; `precisions`, those of `DEFAULT_PRECISIONS` that can be measured.

    Raises:
        UserError: the process failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "machine.json")
        process = _start(_describe, asks_library, str(path))
        process.join()
        if not path.exists():
            raise UserError(
                "torch could not say which devices there are: it ended with exit status "
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
    """Starts a function of this module in a process that leaves nothing behind on the GPU."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    return process


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


def _is_missing(
    name: str,
    precision: str,
    precisions: list[str] | None,
    done: dict[str, Any],
    memory: int | None,
) -> bool:
    """Whether a measurement is to be made.

    Args:
        name: of a size.
        precision: to measure it in.
        precisions: all that are asked for, of which the largest size that fits is searched; None:
            the size was named and is measured in any case.
        done: measurements so far.
        memory: bytes of the device; None: not known.
    """
    ran_out = "out_of_memory" in done.get(f"{name} bf16", {})  # FP8 keeps more
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
    """Parameters of one of `SIZES`."""
    return _shape(name).num_parameters


def expected_bytes(name: str) -> int:
    """What one of `SIZES` takes of the GPU's memory at its fullest, with logits everywhere.

    An estimate: weights, gradients and moments, what the layers keep of a micro-batch, and its
    logits; see sizing/memory.py. The CUDA context and workspaces come on top. 0.5B with its 8
    rows in one micro-batch would take 78 GB of the 80 of an H100, and have more logits than 2^31,
    beyond which kernels with 32-bit indices fail; with 4 rows it takes 44 GB, and has 2.07e9.
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
    """A measurement in a process of its own, which leaves nothing in Megatron's globals.

    Args:
        name: of a size.
        precision: one of `PRECISIONS`.
        about: see `header`.
        device: `cuda` or `cpu`.
        profile: whether to profile a step of each side after the measurement.
        patience: seconds until it is ended.
        keep: takes what was measured as soon as it is there, or under `failed` why nothing is.

    Returns:
        The profile, or why there is none; None where none was asked for, or nothing measured.
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
    """Waits for a process until a time of the clock, and ends it there; says how it ended."""
    process.join(max(0.0, deadline - time.monotonic()))
    if process.is_alive():
        process.kill()
        process.join()
        return "it took longer than --minutes"
    return f"exit status {process.exitcode}"


def _measure(
    name: str, precision: str, about: dict, device: str, profile: bool, directory: str
) -> None:
    """What a process measures: times, and after them a profile, in files of its directory."""
    prepare_environment(device)
    from megatron_mdm.mcore.device import training_device

    sizes = {**(SIZES | TINY)[name], "length": about["length"]}
    write_data(pathlib.Path(directory))
    flags = [
        *model_flags(sizes, about["vocabulary"], device),
        *f"--data-path {directory}/text --data-cache-path {directory}/cache".split(),
        *f"--global-batch-size {sizes['rows'] * sizes['micro_batches']}".split(),
        *PRECISIONS[precision],
        *shlex.split(about["flags"]),
    ]
    result = os.path.join(directory, RESULT)
    try:
        with redirect_stdout(sys.stderr), training_device(device):
            from benchmarks.session import training_session

            with training_session(flags) as session:
                steps = megatron_steps(session)
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
    """Tables of what a step of each side spends its time in, on the device."""
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
    """Peak TFLOP/s of a device in BF16 and FP8; None if it is not known."""
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
