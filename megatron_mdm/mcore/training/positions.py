"""The positions of rows, which Megatron's schedule sends from stage to stage."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from megatron.training import training

from megatron_mdm.mcore.device import replaced
from megatron_mdm.mcore.training.state import TrainingState


@contextmanager
def schedules_positions(state: TrainingState) -> Iterator[None]:
    """Context in which Megatron's schedule exchanges the shapes that rows of blocks have.

    It also counts the batches of evaluations, whose block sizes follow from their number.

    Megatron passes --seq-length and --micro-batch-size to its schedule, which derives the shapes of
    the tensors between pipeline stages. Rows of blocks have several positions for a token, and the
    views of a text share a row. Both numbers may differ between phases of the schedule of block
    sizes, and between training and evaluations. The arguments themselves stay as they are, so
    everything that counts tokens or rows stays right, and so does what a checkpoint records.

    Args:
        state: state of the run.
    """
    choose = training.get_forward_backward_func

    @wraps(choose)
    def choose_with_positions(*words: Any, **named: Any) -> Callable:
        schedule = choose(*words, **named)

        @wraps(schedule)
        def run(*, seq_length: int, micro_batch_size: int, forward_only: bool, **rest: Any) -> Any:
            if forward_only:
                state.begin_evaluation_batch()
            copies, views = state.copies(training=not forward_only)
            return schedule(
                seq_length=seq_length * copies,
                micro_batch_size=micro_batch_size // views,
                forward_only=forward_only,
                **rest | {"decoder_seq_length": None},
            )

        return run

    state.exchanges_positions = True
    with replaced(training, "get_forward_backward_func", choose_with_positions):
        yield
