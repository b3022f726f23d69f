"""The program: Megatron's own `pretrain` with the parts of this plugin."""

import time
from collections.abc import Callable

import torch
from megatron.core.enums import ModelType
from megatron.training import get_tensorboard_writer, pretrain, set_startup_timestamps
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from megatron_mdm.config import requested_save
from megatron_mdm.interruption import INTERRUPTED, Interruption
from megatron_mdm.mcore.checkpoint.kept_tokenizer import tokenizer_files
from megatron_mdm.mcore.checkpoint.loading import failures_in_a_line
from megatron_mdm.mcore.checkpoint.optimizer_state import settings_may_differ
from megatron_mdm.mcore.checkpoint.run_lock import only_writer
from megatron_mdm.mcore.checkpoint.saving import safe_checkpoints
from megatron_mdm.mcore.checkpoint.workers import checkpoint_workers
from megatron_mdm.mcore.data.dataset_helpers import use_shipped_dataset_helpers
from megatron_mdm.mcore.flags.arguments import megatron_errors_as_user_errors, parse
from megatron_mdm.mcore.training.lost_ranks import lost_ranks_in_a_line
from megatron_mdm.mcore.training.megatron_log import readable_log
from megatron_mdm.mcore.training.nonfinite import stops_when_not_finite
from megatron_mdm.mcore.training.objective import Objective, build_objective
from megatron_mdm.mcore.training.positions import schedules_positions
from megatron_mdm.mcore.training.stopping import no_workers_left, stops_together


def run(
    program_start: float,
    interruption: Interruption,
    other_step: Callable[[Objective], Callable] | None = None,
) -> None:
    """Parses sys.argv and trains.

    Args:
        program_start: time.time() at the start of the process, for Megatron's start-up timers.
        interruption: tells whether a signal has asked this rank to stop.
        other_step: returns the forward step of another objective. Evaluations then report only
            that step's loss, and no NELBO. Default: the step of masked diffusion.

    Raises:
        UserError: bad input.
        SystemExit: with status `INTERRUPTED`, if a signal has ended the training.
    """
    set_startup_timestamps(program_start=program_start, main_entry=time.time())
    use_shipped_dataset_helpers()
    with only_writer(requested_save()), no_workers_left():
        args = parse()
        with megatron_errors_as_user_errors():
            objective = build_objective(args)
            step = objective.forward_step if other_step is None else other_step(objective)
        container = pretrain_cfg_container_from_args(args, objective.model_config)
        with (
            safe_checkpoints(args.mdm_checkpoint_hashes, tokenizer_files(args)),
            checkpoint_workers(args.async_save),
            failures_in_a_line(),
            readable_log(args.mdm_device),
            settings_may_differ(args),
            stops_when_not_finite(),
            lost_ranks_in_a_line(args),
            schedules_positions(objective.state),
            stops_together(args, interruption) as stop,
        ):
            try:
                pretrain(
                    container,
                    objective.datasets_provider,
                    ModelType.encoder_or_decoder,
                    stop.begun_by(step),
                    non_loss_data_func=None if other_step else objective.after_evaluation,
                )
            except SystemExit as end:  # Megatron exits this way at --exit-interval and the like
                if end.code:
                    raise
            finally:
                _write_scalars()
        interruption.end()
        with lost_ranks_in_a_line(args):
            _disconnect()
        if stop.has_agreed:
            raise SystemExit(INTERRUPTED)


def _write_scalars() -> None:
    """Flushes the TensorBoard writer, whose thread would lose scalars when the process ends."""
    writer = get_tensorboard_writer()
    if writer is not None:
        writer.flush()


def _disconnect() -> None:
    """Ends the process groups. Megatron leaves their threads alive, which can abort the exit.

    Call it only after success: a rank that failed must not wait here for ranks that wait for it.
    """
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
