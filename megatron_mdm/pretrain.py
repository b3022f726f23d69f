"""`torchrun ... -m megatron_mdm.pretrain <Megatron's flags> --mdm-...`: trains a model.

Without torchrun it is a run of one rank.
"""

import time
from collections.abc import Callable
from typing import Any

from megatron_mdm.config import requested_device
from megatron_mdm.environment import check_megatron_version, join_ranks, prepare_environment
from megatron_mdm.errors import (
    LostRankError,
    UserError,
    exit_rank_with,
    exit_without_another,
)
from megatron_mdm.interruption import Interruption

PROGRAM_START = time.time()


def main(other_step: Callable[[Any], Callable[..., Any]] | None = None) -> None:
    """Runs the program; a `UserError` ends it with one line and status 2.

    So does the loss of another rank, with status 1.

    A signal that asks it to stop ends it with status 75 (interruption.py).

    Args:
        other_step: the forward step of another objective, see `megatron_mdm.mcore.pretrain.run`.
    """
    with Interruption() as interruption:
        prepare_environment(requested_device())
        # Records the exception for torchrun, whose report then ends with the message of the rank
        # that failed first, whatever the others print when their connections break.
        from torch.distributed.elastic.multiprocessing.errors import record

        try:
            record(_run)(interruption, other_step)
        except UserError as error:
            exit_rank_with(error)
        except LostRankError as error:
            exit_without_another(error)


def _run(
    interruption: Interruption, other_step: Callable[[Any], Callable[..., Any]] | None
) -> None:
    check_megatron_version()
    join_ranks()
    from megatron_mdm.mcore.device import training_device

    with training_device(requested_device()):
        from megatron_mdm.mcore.pretrain import run

        run(PROGRAM_START, interruption, other_step)


if __name__ == "__main__":
    main()
