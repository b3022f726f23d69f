"""Turns Megatron's failures while it loads a checkpoint into one line each.

Megatron raises some of them after it has built the model, with a traceback on every rank. Others it
only prints, and ends with status 0 as if the run were complete.
"""

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.training import training
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mdm.config import flag
from megatron_mdm.errors import SharedError, UserError
from megatron_mdm.mcore.checkpoint.optimizer_state import ANOTHER_LAYOUT
from megatron_mdm.mcore.device import replaced

_FAILURES = (
    *(AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError),
    *(CheckpointException, CheckpointingException),
)


@contextmanager
def failures_in_a_line() -> Iterator[None]:
    """Context in which a checkpoint that cannot be loaded ends the run with one line.

    Raises:
        UserError: names the difference, and the flags that help.
    """
    load = _with_a_line(training.load_checkpoint)
    with replaced(training, "load_checkpoint", load):
        yield


def _with_a_line(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        try:
            return load(*args, **kwargs)
        except UserError:
            raise
        except SystemExit as end:
            raise SharedError(
                "the checkpoint cannot be loaded, as Megatron says above: take an earlier one with "
                "--ckpt-step, or add --finetune, which loads only its weights"
            ) from end
        except _FAILURES as error:
            known = _known(error)
            if known is None:
                raise
            raise known from error

    return load_checkpoint


def _known(error: BaseException) -> UserError | None:
    """The line for a known exception; None for any other exception."""
    schedule = re.fullmatch(
        r"OptimizerParamScheduler: class input value (.*) and checkpoint ?value (.*) for (.*) "
        "do not match",
        str(error),
    )
    if schedule:
        here, there, what = schedule.groups()
        return SharedError(
            f"the checkpoint's schedule has another {what}: {there}, here {here} (lengths in "
            "samples). Set --train-iters, --global-batch-size, --lr and the other schedule flags "
            "to their values in the checkpoint, or add --override-opt_param-scheduler for "
            "this run's schedule or --use-checkpoint-opt_param-scheduler for the checkpoint's"
        )
    argument = re.fullmatch(
        r"(\w+) value from checkpoint \((.*)\) is not equal to the input argument value \((.*)\)\.",
        str(error),
    )
    if argument:
        name, there, here = argument.groups()
        return SharedError(
            f"{flag(name)} is {here}, and in the checkpoint {there}: give it the same value"
        )
    if "optimizer.distributed." in str(error):
        return SharedError(
            "the optimizer's state in the checkpoint is in other buckets than this run's. The "
            "buckets depend on --overlap-grad-reduce, --ddp-bucket-size, --ddp-num-buckets and the "
            f"number of data-parallel ranks. {ANOTHER_LAYOUT}"
        )
    if any("rng" in (frame.line or "") for frame in traceback.extract_tb(error.__traceback__)):
        return UserError(
            "the states of the random-number generators in the checkpoint cannot be read here "
            f"({type(error).__name__}: {error}): add --no-load-rng. Masks and rates do not depend "
            "on these states; with dropout, its pattern changes"
        )
    return None
