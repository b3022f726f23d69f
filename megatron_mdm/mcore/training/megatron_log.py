"""Lines of Megatron's log that say nothing here, or the same over and over."""

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

    The rerun machine warns twice in every validation that it is switched off and on again.

    After the first iterations Megatron prints the memory of the GPU, which a CPU has none of, and
    what it expects that to be. In front of that it prints numbers of parameters in billions, with
    two decimals. It has printed them whole when it has built the model.

    Args:
        device: that the run trains on, `cuda` or `cpu`.
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
