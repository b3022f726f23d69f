"""Ends the run at a NaN or infinite loss or gradient, before an optimizer step or a checkpoint.

Megatron's rerun machine finds such a value and computes the iteration a second time. Megatron would
then save a checkpoint so that another GPU can repeat the iteration. That checkpoint would be the
latest one, so every restart would end at the same iteration.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.rerun_state_machine import (
    RerunMode,
    RerunState,
    RerunStateMachine,
    get_rerun_state_machine,
)
from megatron.training.async_utils import maybe_finalize_async_save

from megatron_mdm.errors import SharedError, UserError
from megatron_mdm.mcore.device import replaced

_RESTART = (
    "Nothing of this iteration is saved: the same command goes on from the last checkpoint. If the "
    "run diverges, lower --lr (with --override-opt_param-scheduler) or --clip-grad; "
    "--no-check-for-nan-in-loss-and-grad trains on despite such values"
)
_AGAIN = {
    RerunState.WILL_RERUN_FROM_CHECKPOINT: "and again when it was computed a second time",
    RerunState.RERUNNING_IN_PLACE: "and another value when it was computed a second time, which "
    "suggests a faulty GPU",
}
_FROM_CHECKPOINT = (
    "in the checkpoint that Megatron saved to repeat the iteration: take an earlier one with "
    "--ckpt-step"
)


def check_finite(loss: torch.Tensor, rows: torch.Tensor, training: bool) -> None:
    """Passes the losses of a micro-batch to Megatron's rerun machine, which checks them.

    Args:
        loss: loss of each row, float [b].
        rows: row numbers, int64 [b].
        training: whether the rows are training rows, not evaluation rows.

    Raises:
        UserError: a loss is not finite and nothing is computed a second time: in evaluations, and
            with --rerun-mode disabled.
    """
    machine = get_rerun_state_machine()
    numbered = torch.stack([rows.double(), loss.detach().double()])
    if machine.mode == RerunMode.DISABLED:
        if _is_bad(numbered):
            kind = "training" if training else "evaluation"
            when = f"iteration {machine.current_iteration}, {kind}"
            raise UserError(f"{when}: {_description(numbered)}. {_RESTART}")
        return
    machine.validate_result(
        result=numbered,
        rejection_func=_is_bad,
        message="the loss of a row is NaN or infinite",
        comparison_func=_is_different,
        fatal=True,
    )


@contextmanager
def stops_when_not_finite() -> Iterator[None]:
    """Context in which an iteration with such a value ends the run with one line, unsaved.

    Raises:
        SharedError: names the iteration, and the row or the place where the gradient was checked.
    """
    begin = _from_the_first_iteration(RerunStateMachine.should_run_forward_backward)
    decide = _with_a_line(RerunStateMachine.should_checkpoint_and_exit)
    with (
        replaced(RerunStateMachine, "should_run_forward_backward", begin),
        replaced(RerunStateMachine, "should_checkpoint_and_exit", decide),
    ):
        yield


def _from_the_first_iteration(begin: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def should_run_forward_backward(machine: RerunStateMachine, data_iterator: Any) -> bool:
        # Megatron checks nothing in the first iteration, because it could not save a checkpoint.
        machine.first_iteration_complete = True
        return begin(machine, data_iterator)

    return should_run_forward_backward


def _with_a_line(decide: Callable[[Any], tuple[bool, bool, int]]) -> Callable[[Any], Any]:
    def should_checkpoint_and_exit(machine: RerunStateMachine) -> tuple[bool, bool, int]:
        decision = decide(machine)
        if not decision[1]:
            return decision
        mine = _found(machine) if machine.rerun_requested else None
        found = [mine] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, mine)
        first = next((f"rank {i}: {x}" for i, x in enumerate(found) if x), "the loss is not finite")
        maybe_finalize_async_save(blocking=True)  # the save of an earlier iteration
        again = _AGAIN.get(machine.state, _FROM_CHECKPOINT)
        raise SharedError(f"iteration {machine.current_iteration}, {first}, {again}. {_RESTART}")

    return should_checkpoint_and_exit


def _found(machine: RerunStateMachine) -> str:
    """Describes the value that this rank's check rejected."""
    result = machine.initial_result
    if isinstance(result, torch.Tensor) and result.dim() == 2:
        return _description(result)
    return str(machine.failed_validation_call.caller.message)


def _description(numbered: torch.Tensor) -> str:
    bad = (~numbered[1].isfinite()).nonzero().flatten().tolist()
    row, loss = numbered[:, bad[0]].tolist()
    others = f" (and of {len(bad) - 1} more of its micro-batch)" if bad[1:] else ""
    return f"the loss of row {row:.0f} is {loss}{others}"


def _is_bad(numbered: torch.Tensor) -> bool:
    return not numbered[1].isfinite().all()


def _is_different(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(not torch.equal(one.nan_to_num(), other.nan_to_num()))
