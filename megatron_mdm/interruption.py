"""Signals that ask a run to stop: it saves at the end of the iteration and leaves with status 75.

Imports torch and Megatron nowhere: the handler is there before they are.
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
INTERRUPTED = os.EX_TEMPFAIL  # 75: the same command goes on from there


class Interruption:
    """Context manager: takes note of the signals that ask this process to stop.

    Before `has_begun` they end the process at once, by `SystemExit`. From then on somebody has to
    look at `is_requested`. After `end`, when the process is about to exit, they do nothing. A
    torchrun that is gone asks to stop as well, since nothing else would stop its ranks.

    A SIGTERM ends the process at once when a rank has gone: the others, which torchrun stops then,
    can save nothing. They may wait for it in C, where no handler of Python's runs, so a thread
    looks as well.
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
        """Takes note of these signals from now on, whoever handled them before."""
        for number in numbers:
            before = signal.signal(number, self._note)
            self._before.setdefault(number, before)

    def end(self) -> None:
        """Has the signals do nothing any more, until the process is gone.

        They are ignored, since the interpreter gives a signal with a handler back to its default
        action while it exits, and that would end the process.
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
        is_loader_worker = os.getpid() != self._process  # which ends with its rank
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
        """Reads the signals that have come, a byte each, also those of forked loader workers."""
        with open(reader, "rb", buffering=0) as pipe:
            while received := pipe.read(1):
                self._end_if_a_rank_has_gone(received[0])

    def _end_if_a_rank_has_gone(self, number: int) -> None:
        if number == signal.SIGTERM and not self._has_ended and self._a_rank_has_gone():
            os._exit(128 + number)  # a thread cannot give the signal its default action back

    def _a_rank_has_gone(self) -> bool:
        """Whether torchrun is stopping what a failed rank has left: nothing can be saved then."""
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
    """The process of torchrun, if this one is its child."""
    name, parent = "TORCHELASTIC_RUN_ID", os.getppid()
    if name not in os.environ:
        return None
    with suppress(psutil.Error):  # a script between the two has this variable too
        return None if name in psutil.Process(parent).environ() else parent
    return None


def die_of(number: int) -> NoReturn:
    """Ends this process as a signal does that nobody handles."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise SystemExit(128 + number)  # not reached


@contextmanager
def children_without_signals() -> Iterator[None]:
    """Context in which processes are started that none of `SIGNALS` reaches, for all their life.

    Ctrl-C, and what torchrun sends, go to the whole process group; such a process ends as its
    parent says, or with it (`end_with_parent`).
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        # A helper of multiprocessing's. The first start of a process would start it, and would
        # unblock the signals.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def end_with_parent() -> None:
    """Makes this process, which multiprocessing spawned, end within seconds of its parent."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_outlive_nobody, args=(parent.pid,), daemon=True).start()


def _outlive_nobody(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
