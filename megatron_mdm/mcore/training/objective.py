"""The functions that Megatron's `pretrain` takes. They share one `TrainingState`."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.training.global_vars import get_tokenizer

from megatron_mdm.mcore.data.row_dataset import datasets_provider
from megatron_mdm.mcore.model.builder import (
    MDMHybridModelConfig,
    MDMModelConfig,
    TrainingHooks,
    model_config,
)
from megatron_mdm.mcore.training.carried import carried_states
from megatron_mdm.mcore.training.forward_step import forward_step
from megatron_mdm.mcore.training.hooks import after_evaluation, after_gradients
from megatron_mdm.mcore.training.state import TrainingState


@dataclass(frozen=True)
class Objective:
    """The objects that a script passes to Megatron.

    Attributes:
        state: state of this run, shared by the functions below.
        model_config: Megatron's configuration of the model, with its builder.
        datasets_provider: Megatron's argument `train_valid_test_dataset_provider`.
        forward_step: Megatron's argument `forward_step_func`.
        after_gradients: replaces Megatron's `finalize_model_grads`; `model_config` already has it.
        after_evaluation: Megatron's argument `non_loss_data_func`.
    """

    state: TrainingState
    model_config: MDMModelConfig | MDMHybridModelConfig
    datasets_provider: Callable
    forward_step: Callable
    after_gradients: Callable[..., None]
    after_evaluation: Callable[[list], None]


def build_objective(args: Namespace) -> Objective:
    """Builds an objective with a new `TrainingState`.

    A run needs one objective. After the run, a process may train another one with other arguments,
    once it has reset Megatron's globals (megatron.training.training.destroy_global_state).

    Args:
        args: Megatron's arguments, as `finalize_args` returned them.
    """
    state = TrainingState(args, get_tokenizer().eod)
    # WorkRecorder (throughput.py) replaces Megatron's own count of operations.
    args.log_throughput = False

    def step(iterator: Iterator | None, model: Any) -> Any:
        return forward_step(state, iterator, model)

    def finalize(model: list, num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
        after_gradients(state, model, num_tokens, **kwargs)

    def evaluated(model: list) -> None:
        after_evaluation(state, model)

    def before_model() -> None:
        if state.sampler is not None:
            state.sampler.follow_reruns()

    def modules(config: Any, vp_stage: int | None) -> Any:
        return carried_states(state, config, vp_stage)

    def positions_per_token() -> float:
        # Megatron also asks in an evaluation before training, whose answer it does not use.
        copies, views = state.copies(training=state.has_begun)
        return copies / views

    hooks = TrainingHooks(finalize, before_model, modules, positions_per_token)
    return Objective(
        state,
        model_config(args, state.mdm, hooks),
        datasets_provider(args, state.mdm),
        step,
        finalize,
        evaluated,
    )
