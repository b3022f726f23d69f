"""Measures time and peak memory of a function; other work on the machine has little effect.

On the CPU, time is the processor time of all threads of the process. Peak memory is the peak beyond
the memory before the call: torch's allocator reports it on CUDA, and Linux reports it for the
process on the CPU.
"""

import contextlib
import ctypes
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any


def device_name(device: str) -> str:
    """Returns the name of the GPU or of the processor."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Returns the processor time of all threads; on CUDA the wall-clock time, device included."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    work()
    return time.process_time() - start


def time_and_peak_memory(work: Callable[[], object], device: str) -> tuple[float, int | None]:
    """Returns `seconds_of` a function and its peak memory in bytes, None if that is not known."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        spent = seconds_of(work, device)
        return spent, torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError, AttributeError):  # only Linux with glibc has these
        ctypes.CDLL(None).malloc_trim(0)  # else reused memory would not show in the peak
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the recorded peak
    resident = resident_bytes("VmRSS")
    spent = seconds_of(work, device)
    peak = resident_bytes("VmHWM")
    return spent, None if resident is None or peak is None else peak - resident


def resident_bytes(name: str) -> int | None:
    """Returns this process's memory from Linux: VmRSS now, VmHWM the peak; None elsewhere."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{name}:")), None)


def quartiles(values: list[float]) -> dict[str, Any]:
    """Returns median and quartiles of repeated measurements."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"median": middle, "quartiles": [low, high], "repeats": len(values)}
