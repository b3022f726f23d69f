"""The objective as Megatron's `pretrain` takes it: functions that share one `TrainingState`."""

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
    """What a script passes to Megatron.

    Attributes:
        state: of this run, which the others share.
        model_config: Megatron's configuration of the model, with its builder.
        datasets_provider: its `train_valid_test_dataset_provider`.
        forward_step: its `forward_step_func`.
        after_gradients: its `finalize_model_grads`, which `model_config` has already.
        after_evaluation: its `non_loss_data_func`.
    """

    state: TrainingState
    model_config: MDMModelConfig | MDMHybridModelConfig
    datasets_provider: Callable
    forward_step: Callable
    after_gradients: Callable[..., None]
    after_evaluation: Callable[[list], None]


def build_objective(args: Namespace) -> Objective:
    """Builds an objective from what `finalize_args` returned, with a `TrainingState` of its own.

    A run takes one. A process may train another one, with other arguments, when the run is over and
    Megatron's own globals are reset (megatron.training.training.destroy_global_state).

    Args:
        args: Megatron's arguments.
    """
    state = TrainingState(args, get_tokenizer().eod)
    # The state's own count takes the place of Megatron's (throughput.py).
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

    return Objective(
        state,
        model_config(args, state.mdm, TrainingHooks(finalize, before_model, modules)),
        datasets_provider(args, state.mdm),
        step,
        finalize,
        evaluated,
    )
