"""Removes lines of Megatron's log that are meaningless here or that only repeat."""

import contextlib
import logging
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron.core import rerun_state_machine
from megatron.training import training

from megatron_mdm.mcore.device import replaced


@contextlib.contextmanager
def readable_log(device: str) -> Iterator[None]:
    """Context in which a run logs without these lines.

    In every validation the rerun machine warns twice, because it is switched off and on again.

    After the first iterations Megatron prints the GPU memory in use and the memory that it expects;
    neither exists on a CPU. Before that it prints parameter counts in billions with two decimals.
    It has already printed the full counts after it built the model.

    Args:
        device: the device that the run trains on, `cuda` or `cpu`.
    """
    expected = training.report_theoretical_memory

    def report_expected(args: Namespace, num_microbatches: int, verbose: bool) -> None:
        expected(args, num_microbatches)

    with contextlib.ExitStack() as stack:
        rerun_state_machine.logger.addFilter(_is_not_about_the_mode)
        stack.callback(rerun_state_machine.logger.removeFilter, _is_not_about_the_mode)
        if device == "cpu":
            stack.enter_context(replaced(training, "report_memory", _nothing))
            stack.enter_context(replaced(training, "report_theoretical_memory", _nothing))
        else:
            stack.enter_context(replaced(training, "report_theoretical_memory", report_expected))
        yield


def _is_not_about_the_mode(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Setting RerunStateMachine mode")


def _nothing(*_: Any, **__: Any) -> None:
    pass
