"""The hooks that Megatron calls once per iteration and once per evaluation, on all ranks."""

from typing import Any

import torch
from megatron.core import mpu
from megatron.core.distributed import finalize_model_grads
from megatron.training.utils import is_last_rank

from megatron_mdm.mcore.training.logs import log_evaluation, log_refit, log_training
from megatron_mdm.mcore.training.state import TrainingState
from megatron_mdm.objective.randomness import Split


def after_gradients(
    state: TrainingState, model: list, num_tokens: torch.Tensor | None = None, **kwargs: Any
) -> None:
    """Runs Megatron's `finalize_model_grads`, then P-POTS, then the log, before the optimizer step.

    Megatron's rerun machine may repeat an iteration. A repetition is not logged again.
    """
    finalize_model_grads(model, num_tokens, **kwargs)
    iteration = state.training_iteration
    sampler = state.fitting_sampler
    if sampler is not None:  # the density q(t) changes here
        refit = sampler.end_iteration(iteration)
        if refit is not None and is_last_rank():
            log_refit(refit, sampler.state.moments.skipped, iteration)
    if not mpu.is_pipeline_last_stage(ignore_virtual=True):
        return
    recorder = state.recorder(training=True)
    recorder.commit(iteration, state.uniform_share)
    if state.work is not None:
        state.work.commit(iteration)
    if iteration % state.log_interval == 0 and recorder.total is not None:
        summary = recorder.reduce()[Split.TRAIN]
        flops = None if state.work is None else state.work.reduce()
        seconds = state.clock.lap()
        if is_last_rank():
            log_training(state, summary, iteration, seconds, flops)


def after_evaluation(state: TrainingState, model: list) -> None:
    """Logs the NELBO of an evaluation; Megatron calls it as `non_loss_data_func` at its end."""
    if not mpu.is_pipeline_last_stage(ignore_virtual=True):
        return
    recorder = state.recorder(training=False)
    recorder.commit(None)  # two evaluations may follow one iteration
    by_text = recorder.by_text()
    for part, summary in recorder.reduce().items():
        if is_last_rank():
            log_evaluation(state.evaluated[part], summary, by_text[part], state.iteration)
