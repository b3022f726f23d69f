"""One start of a run under the launcher: its memory, a strike, and the processes that it leaves."""

import os
import pathlib
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from benchmarks.soak.plan import Strike
from megatron_mdm.errors import UserError

MARK = "MDM_SOAK_JOB"  # a variable that all processes of a start inherit
GONE_WITHIN = 120.0  # seconds in which the processes of an ended start have to end
SILENT = 1200.0  # seconds without a new iteration after which a start counts as hanging
POLL, SAMPLE = 0.2, 5.0  # seconds
_ITERATION = re.compile(rb" iteration +(\d+)/")


@dataclass
class Start:
    """What was seen of one start.

    Attributes:
        status: exit status of the launcher; negative for a signal.
        strike: the strike that it got, if any.
        seconds: wall-clock seconds until the launcher ended.
        gone: seconds from then until its last process ended.
        left: command lines of the processes that were there after `GONE_WITHIN` seconds.
        segments: files of shared memory that its processes had mapped, and that are still there.
        samples: iteration, and bytes by role: `rank 0`, and `workers of rank 0` for its children.
    """

    status: int = 0
    strike: Strike | None = None
    seconds: float = 0.0
    gone: float = 0.0
    left: list[str] = field(default_factory=list)
    segments: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)


def run_job(
    ranks: int,
    flags: Sequence[str],
    log: pathlib.Path,
    scratch: pathlib.Path,
    strike: Strike | None = None,
) -> Start:
    """Starts a run, strikes it, and waits until all of its processes have ended.

    Args:
        ranks: number of ranks.
        flags: flags of the program.
        log: file for all output.
        scratch: directory of temporary files, as TMPDIR.
        strike: what to do to it, if anything. It does not count if the run ends well before.

    Raises:
        UserError: the run hangs.
    """
    mark, begin, start = secrets.token_hex(8), time.monotonic(), Start()
    environment = os.environ | {MARK: mark, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_mdm.launch", "--standalone", "--local-addr"]
    command += ["127.0.0.1", "--nproc-per-node", str(ranks), "-m", "megatron_mdm.pretrain", *flags]
    with open(log, "wb") as output:
        launcher = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        mapped = _watch(launcher, mark, log, strike, start)
        start.status = launcher.wait()
        if start.status == 0:
            start.strike = None  # the run had done its work before the signal took effect
        ended = time.monotonic()
        start.seconds = round(ended - begin, 1)
        while processes_of(mark) and time.monotonic() < ended + GONE_WITHIN:
            time.sleep(POLL)
        start.gone = round(time.monotonic() - ended, 1)
        for process in processes_of(mark):
            with suppress(psutil.NoSuchProcess):
                start.left.append(f"{process.pid} {' '.join(process.cmdline())}"[:200])
    finally:
        for process in processes_of(mark):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        launcher.wait()
    start.segments = names_of(mapped)
    return start


def _watch(
    launcher: Any, mark: str, log: pathlib.Path, strike: Strike | None, start: Start
) -> set[int]:
    """Reads the log of a run until it ends; takes samples of its memory, and strikes it once.

    Returns:
        Inodes of the shared memory that its processes had mapped.
    """
    iteration, place = 0, 0
    mapped: set[int] = set()
    changed = sampled = time.monotonic()
    while launcher.poll() is None:
        time.sleep(POLL)
        with open(log, "rb") as file:
            file.seek(place)
            text = file.read()
        if found := _ITERATION.findall(text):
            place += text.rindex(b" iteration ") + 1
            iteration, changed = int(found[-1]), time.monotonic()
        now = time.monotonic()
        if now > changed + SILENT:
            raise UserError(f"the run hangs after iteration {iteration}: its log is {log}")
        if iteration and now > sampled + SAMPLE:
            sampled = now
            start.samples.append({"iteration": iteration, **memory(launcher)})
            mapped |= segments_of(processes_of(mark))
        if strike is not None and start.strike is None and iteration >= strike.iteration:
            mapped |= segments_of(processes_of(mark))
            time.sleep(strike.delay)
            if hit(launcher, mark, strike):
                start.strike = strike
    return mapped


def hit(launcher: Any, mark: str, strike: Strike) -> bool:
    """Sends the signal of a strike; False if the run has just ended."""
    ranks = ranks_of(launcher)
    if not ranks or launcher.poll() is not None:
        return False
    victims = {
        "rank": [ranks[strike.victim % len(ranks)]],
        "launcher": [launcher],
        "stop": [launcher],
        "all": processes_of(mark),
    }[strike.kind]
    for victim in victims:
        with suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGTERM if strike.kind == "stop" else signal.SIGKILL)
    return True


def ranks_of(launcher: Any) -> list[psutil.Process]:
    """The ranks of a launcher, in their order."""
    found = {}
    with suppress(psutil.NoSuchProcess):
        for process in launcher.children():
            with suppress(psutil.Error):
                if "megatron_mdm.pretrain" in process.cmdline():
                    found[int(process.environ()["RANK"])] = process
    return [found[rank] for rank in sorted(found)]


def processes_of(mark: str) -> list[psutil.Process]:
    """All living processes that have inherited this mark."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def segments_of(processes: Sequence[psutil.Process]) -> set[int]:
    """Inodes of the shared memory that these processes have mapped, semaphores included.

    glibc maps a semaphore under a temporary name, which is gone when the semaphore has its own.
    """
    found: set[int] = set()
    for process in processes:
        with suppress(OSError):  # it has ended
            text = pathlib.Path(f"/proc/{process.pid}/maps").read_text()
            found |= set(map(int, re.findall(r" (\d+) +/dev/shm/", text)))
    return found


def names_of(segments: set[int]) -> list[str]:
    """Paths of the shared memory with these inodes that still has a name."""
    if not os.path.isdir("/dev/shm"):
        return []
    return sorted(entry.path for entry in os.scandir("/dev/shm") if entry.inode() in segments)


def memory(launcher: Any) -> dict[str, int]:
    """Bytes of anonymous memory (heap, stacks) of each rank, and of its children together.

    It excludes files: the pages of an index that a run has read stay mapped, and so their number
    grows. It includes pages that a process shares with its parent, so it does not change when one
    of the two ends.
    """
    found: dict[str, int] = {}
    for rank, process in enumerate(ranks_of(launcher)):
        with suppress(psutil.NoSuchProcess, OSError):  # it has just ended
            rss = process.memory_info().rss
            found |= {f"rank {rank}": anonymous(process), f"rank {rank} RSS": rss}
            children = process.children(recursive=True)
            if children:
                found[f"workers of rank {rank}"] = sum(map(anonymous, children))
    return found


def anonymous(process: psutil.Process) -> int:
    """Bytes of anonymous memory of a process.

    Raises:
        OSError: it has ended.
    """
    text = pathlib.Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
    return int(re.findall(r"^Anonymous: +(\d+) kB$", text, re.MULTILINE)[0]) * 2**10
