"""The program: Megatron's own `pretrain` with the parts of this plugin."""

import time

import torch
from megatron.core.enums import ModelType
from megatron.training import pretrain, set_startup_timestamps
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from megatron_mdm.mcore.arguments import parse
from megatron_mdm.mcore.dataset import (
    train_valid_test_datasets_provider,
    use_shipped_dataset_helpers,
)
from megatron_mdm.mcore.forward_step import forward_step
from megatron_mdm.mcore.metrics import evaluation_hook
from megatron_mdm.mcore.model import model_config


def run(program_start: float) -> None:
    """Trains as sys.argv says.

    Args:
        program_start: time.time() at the start of the process, for Megatron's start-up timers.

    Raises:
        UserError: bad input.
    """
    set_startup_timestamps(program_start=program_start, main_entry=time.time())
    use_shipped_dataset_helpers()
    args = parse()
    container = pretrain_cfg_container_from_args(args, model_config(args))
    try:
        pretrain(
            container,
            train_valid_test_datasets_provider,
            ModelType.encoder_or_decoder,
            forward_step,
            non_loss_data_func=evaluation_hook,
        )
        torch.distributed.barrier()
    finally:
        # Megatron leaves its groups and their threads alive, which can abort the process at exit.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
