"""The program: Megatron's own `pretrain` with the parts of this plugin."""

import time

import torch
from megatron.core.enums import ModelType
from megatron.training import pretrain, set_startup_timestamps
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from megatron_mdm.config import requested_save
from megatron_mdm.mcore.arguments import megatron_may_reject_flags, parse
from megatron_mdm.mcore.dataset import (
    train_valid_test_datasets_provider,
    use_shipped_dataset_helpers,
)
from megatron_mdm.mcore.forward_step import forward_step
from megatron_mdm.mcore.loading import failures_in_a_line
from megatron_mdm.mcore.metrics import evaluation_hook
from megatron_mdm.mcore.model import model_config
from megatron_mdm.mcore.nonfinite import not_saved
from megatron_mdm.mcore.optimizer_state import settings_may_differ
from megatron_mdm.mcore.run_lock import only_writer
from megatron_mdm.mcore.saving import safe_checkpoints


def run(program_start: float) -> None:
    """Trains as sys.argv says.

    Args:
        program_start: time.time() at the start of the process, for Megatron's start-up timers.

    Raises:
        UserError: bad input.
    """
    set_startup_timestamps(program_start=program_start, main_entry=time.time())
    use_shipped_dataset_helpers()
    with only_writer(requested_save()):
        args = parse()
        with megatron_may_reject_flags():
            config = model_config(args)
        container = pretrain_cfg_container_from_args(args, config)
        try:
            with (
                safe_checkpoints(args.mdm_checkpoint_hashes),
                failures_in_a_line(),
                settings_may_differ(args),
                not_saved(),
            ):
                pretrain(
                    container,
                    train_valid_test_datasets_provider,
                    ModelType.encoder_or_decoder,
                    forward_step,
                    non_loss_data_func=evaluation_hook,
                )
        except SystemExit as end:  # how Megatron ends at --exit-interval and the like
            if not end.code:
                _disconnect()
            raise
        _disconnect()


def _disconnect() -> None:
    """Ends the process groups, whose threads Megatron leaves alive: they can abort the exit.

    Only after success: a rank that failed must not wait for the others, which wait for it.
    """
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
