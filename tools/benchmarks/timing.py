"""Time and peak memory of a piece of work, in ways that other work on the machine disturbs little.

On the CPU, time is that of the processor, of all threads of the process. Peak memory is what the
work takes beyond what was there before, as torch's allocator says on CUDA, and on the CPU Linux of
the process.
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
    """What the figures are of: the GPU's name, or the processor's."""
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
    """Seconds of processor time of all threads; on CUDA of the clock, with the device's work."""
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
    """`seconds_of` some work, and the most bytes that it had at a time; None if nothing says it."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        spent = seconds_of(work, device)
        return spent, torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError, AttributeError):  # which are of Linux with glibc
        ctypes.CDLL(None).malloc_trim(0)  # freed memory would be taken again unseen
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present
    resident = resident_bytes("VmRSS")
    spent = seconds_of(work, device)
    peak = resident_bytes("VmHWM")
    return spent, None if resident is None or peak is None else peak - resident


def resident_bytes(name: str) -> int | None:
    """Bytes of memory of this process, from Linux: VmRSS now, VmHWM at most; None elsewhere."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{name}:")), None)


def quartiles(values: list[float]) -> dict[str, Any]:
    """Median and quartiles of repeated measurements."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"median": middle, "quartiles": [low, high], "repeats": len(values)}
