"""Ends the training at the end of an iteration, on all ranks, once one of them is asked to stop."""

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
    """Megatron's signal handler, as --exit-signal-handler asks it in every iteration."""

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
        """A forward step that ends, in training, the time of signals that end a run at once."""

        @functools.wraps(forward_step)
        def begin(data_iterator: Any, model: Any, *args: Any) -> Any:
            self._interruption.has_begun |= model.training
            return forward_step(data_iterator, model, *args)

        return begin


@contextmanager
def stops_together(args: Namespace, interruption: Interruption) -> Iterator[StopTogether]:
    """Context in which Megatron saves and leaves after an iteration when a signal asks for it."""
    # Megatron has set a handler of its own if there is --exit-signal-handler.
    interruption.listen(*SIGNALS, args.exit_signal)
    # Loader workers ignore this one then, which reaches them too; the others they inherit.
    args.exit_signal_handler, args.exit_signal = True, signal.SIGTERM
    stop = StopTogether(interruption)
    with replaced(global_vars, "_GLOBAL_SIGNAL_HANDLER", stop):
        yield stop


@contextmanager
def no_workers_left() -> Iterator[None]:
    """Context after which no child of this process is left.

    Loader workers do not answer to SIGTERM, by which multiprocessing would end them, and wait for
    them, as the interpreter exits.
    """
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises for each worker that dies
        for child in multiprocessing.active_children():
            child.kill()
