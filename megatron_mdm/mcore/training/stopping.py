"""Ends training on all ranks at the end of an iteration, once a signal asks any rank to stop."""

import functools
import multiprocessing
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.training import global_vars

from megatron_mdm.interruption import SIGNALS, Interruption
from megatron_mdm.mcore.device import replaced


class StopTogether:
    """Replaces Megatron's signal handler, which --exit-signal-handler reads in every iteration."""

    def __init__(self, interruption: Interruption) -> None:
        self._interruption = interruption
        self.has_agreed = False

    def signals_received(self) -> list[bool]:
        """Whether any rank was asked to stop; a collective call of 4 bytes."""
        asked = self._interruption.is_requested()
        answer = torch.tensor([asked], dtype=torch.int32, device=torch.cuda.current_device())
        torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MAX)
        self.has_agreed = bool(answer.item())
        return [self.has_agreed]

    def begun_by(self, forward_step: Callable) -> Callable:
        """Wraps a forward step so that its first training call marks the run as begun.

        Until then a signal ends the run at once; afterwards it ends the run after an iteration.
        """

        @functools.wraps(forward_step)
        def begin(data_iterator: Any, model: Any, *args: Any) -> Any:
            self._interruption.has_begun |= model.training
            return forward_step(data_iterator, model, *args)

        return begin


@contextmanager
def stops_together(args: Namespace, interruption: Interruption) -> Iterator[StopTogether]:
    """Context in which a signal makes Megatron save and exit after the current iteration."""
    # With --exit-signal-handler Megatron has already set its own handler. This replaces it.
    interruption.listen(*SIGNALS, args.exit_signal)
    # Loader workers then ignore SIGTERM, which reaches them too. They inherit the other handlers.
    args.exit_signal_handler, args.exit_signal = True, signal.SIGTERM
    stop = StopTogether(interruption)
    with replaced(global_vars, "_GLOBAL_SIGNAL_HANDLER", stop):
        yield stop


@contextmanager
def no_workers_left() -> Iterator[None]:
    """Context that kills the remaining child processes of this process when it ends.

    At interpreter exit multiprocessing sends SIGTERM to loader workers and waits for them. They
    ignore SIGTERM, so the wait would not end.
    """
    try:
        yield
    finally:
        # torch's handler of SIGCHLD raises for each worker that dies.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in multiprocessing.active_children():
            child.kill()
