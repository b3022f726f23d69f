r"""Trains a masked-diffusion language model with Megatron.

    python -m megatron_mdm.pretrain --mdm-device cpu --mock-data --split 1,0,0 \
        --tokenizer-type NullTokenizer --vocab-size 127 --mdm-mask-token-id 127 \
        --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 \
        --max-position-embeddings 64 --micro-batch-size 4 --global-batch-size 8 \
        --train-iters 10 --lr 1e-3 --log-interval 1 --eval-interval 10 --eval-iters 0

This example trains on random tokens in one process, on the CPU. To train on N GPUs, start the
program with `torchrun --nproc-per-node N -m megatron_mdm.pretrain`. It takes all flags of Megatron,
and the --mdm-* flags of masked diffusion, which are the last groups below and in
megatron_mdm/FLAGS.md.
"""

import faulthandler
import time
from collections.abc import Callable
from typing import Any

from megatron_mdm.config import requested_device
from megatron_mdm.environment import join_ranks, prepare_environment
from megatron_mdm.errors import UserError, exit_rank_after, exit_rank_with
from megatron_mdm.interruption import Interruption

PROGRAM_START = time.time()


def main(other_step: Callable[[Any], Callable[..., Any]] | None = None) -> None:
    """Runs the program.

    A `UserError` ends it with one line and status 2. The loss of another rank ends it with one line
    and status 1. A signal that asks it to stop ends it with status 75 (interruption.py).

    Args:
        other_step: builds the forward step of another objective; see
            `megatron_mdm.mcore.pretrain.run`.
    """
    with Interruption() as interruption:
        prepare_environment(requested_device())
        faulthandler.enable()  # a crash in C code prints the Python stack
        try:
            _run(interruption, other_step)
        except UserError as error:
            exit_rank_with(error)
        except Exception as error:
            exit_rank_after(error)
            raise


def _run(
    interruption: Interruption, other_step: Callable[[Any], Callable[..., Any]] | None
) -> None:
    join_ranks()
    from megatron_mdm.mcore.device import training_device

    with training_device(requested_device()):
        from megatron_mdm.mcore.pretrain import run

        run(PROGRAM_START, interruption, other_step)


if __name__ == "__main__":
    main()
