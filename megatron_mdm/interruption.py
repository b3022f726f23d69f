"""Signals that ask a run to stop: it saves after the current iteration and exits with status 75.

This module does not import torch or Megatron, so that the handlers are installed before they load.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, NoReturn

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INTERRUPTED = os.EX_TEMPFAIL  # 75: the same command resumes the run


class Interruption:
    """Context manager that records signals that ask this process to stop.

    As long as `has_begun` is False, a signal ends the process at once by `SystemExit`. Afterwards a
    signal only makes `is_requested` return True, and the training loop has to check this. After
    `end`, when the process is about to exit, signals do nothing. If torchrun has ended, this counts
    as a request to stop too, because nothing else would stop its ranks.

    If a rank of the node has ended, SIGTERM ends the process at once: torchrun is then stopping the
    other ranks, which cannot save without that rank. They may be waiting for it in C code, where
    Python runs no signal handler, so a thread checks as well.
    """

    def __init__(self) -> None:
        self.has_begun = False
        self._has_ended = self._received = False
        self._process = os.getpid()
        self._launcher = _torchrun()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self.listen(*SIGNALS)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        os.close(signal.set_wakeup_fd(-1))
        if not self._has_ended:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def listen(self, *numbers: int) -> None:
        """Handles these signals from now on, in place of their earlier handlers."""
        for number in numbers:
            before = signal.signal(number, self._note)
            self._before.setdefault(number, before)

    def end(self) -> None:
        """Makes the signals do nothing until the process has ended.

        The signals are set to be ignored. With a Python handler instead, the interpreter would
        restore the default action while it exits, and a signal would then kill the process.
        """
        self._has_ended = True
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def is_requested(self) -> bool:
        """Whether this process has been asked to stop."""
        if not self._received and self._launcher not in (None, os.getppid()):
            self._received = True
            self._say("torchrun is gone")
        return self._received

    def _note(self, number: int, _frame: FrameType | None) -> None:
        is_loader_worker = os.getpid() != self._process  # a worker ends with its rank
        if self._has_ended or is_loader_worker:
            return
        name = signal.Signals(number).name
        self._end_if_a_rank_has_gone(number)
        is_first, self._received = not self._received, True
        if not self.has_begun:
            print(f"{name}: the run ends, nothing was trained yet", file=sys.stderr, flush=True)
            raise SystemExit(INTERRUPTED)
        if is_first:
            self._say(name)

    def _watch(self, reader: int) -> None:
        """Reads the received signals, one byte each, those of forked loader workers included."""
        with open(reader, "rb", buffering=0) as pipe:
            while received := pipe.read(1):
                self._end_if_a_rank_has_gone(received[0])

    def _end_if_a_rank_has_gone(self, number: int) -> None:
        if number == signal.SIGTERM and not self._has_ended and self._a_rank_has_gone():
            os._exit(128 + number)  # a thread cannot restore the signal's default action

    def _a_rank_has_gone(self) -> bool:
        """Whether a rank of this node has ended, so that torchrun is stopping the others."""
        if self._launcher is None or self._launcher != os.getppid():
            return False
        try:
            ranks = psutil.Process(self._launcher).children()
        except psutil.NoSuchProcess:
            return False
        return len(ranks) < int(os.environ["LOCAL_WORLD_SIZE"])

    def _say(self, cause: str) -> None:
        text = f"rank {os.environ.get('RANK', '0')}: {cause}: the run ends after this iteration"
        print(text, file=sys.stderr, flush=True)


def _torchrun() -> int | None:
    """Process id of torchrun, if it is the parent of this process; else None."""
    name, parent = "TORCHELASTIC_RUN_ID", os.getppid()
    if name not in os.environ:
        return None
    with suppress(psutil.Error):  # a script between torchrun and the rank has this variable too
        return None if name in psutil.Process(parent).environ() else parent
    return None


def die_of(number: int) -> NoReturn:
    """Ends this process by a signal with its default action."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise SystemExit(128 + number)  # not reached


@contextmanager
def children_without_signals() -> Iterator[None]:
    """Context in which started processes never receive any of `SIGNALS`.

    Ctrl-C and torchrun's signals go to the whole process group. A process started here ends only
    when its parent tells it to, or when its parent ends (`end_with_parent`).
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        # A helper process of multiprocessing. The first start of a child process would start it,
        # which unblocks the signals.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def end_with_parent() -> None:
    """Makes this process, a child spawned by multiprocessing, end seconds after its parent."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_outlive_nobody, args=(parent.pid,), daemon=True).start()


def _outlive_nobody(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
