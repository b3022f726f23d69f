"""FP8: evaluations leave the scales unchanged, and models without FP8 load checkpoints with scales.

Checkpoints hold the scales in Transformer Engine's format. Models without delayed scaling ignore
them.

Transformer Engine's delayed scaling computes scales from a history of the largest entries (amax) of
each tensor. Without gradients it does not update scales, but each tensor that it rounds still adds
its largest entry to the history, and the next training step computes its scale from that history.
The rows of an evaluation would thus influence training, and two runs that evaluate at different
times would differ.
"""

from collections.abc import Iterator
from typing import Any

import torch


def ignore_fp8_state_on_load(model: torch.nn.Module) -> None:
    """Makes a model without delayed scaling load checkpoints of models with it.

    Transformer Engine would refuse the scales, which are a pickle, although nothing needs them.

    Args:
        model: model with layers of either implementation.
    """

    def leave_out(_: Any, state: dict[str, Any], *__: Any) -> None:
        for name in state:
            if name.rpartition(".")[2].startswith("_extra_state"):
                state[name] = None

    model.register_load_state_dict_pre_hook(leave_out)


def keep_scales_in_evaluation(model: torch.nn.Module) -> None:
    """Makes forward passes in evaluation mode leave the state of delayed scaling unchanged.

    Evaluations compute in FP8 with the scales of training. The state is restored afterwards, from
    two small copies for each layer. Other FP8 recipes have no such state.

    Args:
        model: model with Transformer Engine's modules.
    """
    kept: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def before(module: torch.nn.Module, _: Any) -> None:
        if not module.training:
            kept.append([(tensor, tensor.clone()) for tensor, _ in _delayed_scaling(module)])

    def after(module: torch.nn.Module, *_: Any) -> None:
        if not kept:
            return
        earlier = kept.pop()
        for tensor, value in earlier:
            tensor.copy_(value)
        known = {id(tensor) for tensor, _ in earlier}
        for tensor, initial in _delayed_scaling(module):
            if id(tensor) not in known:  # created by this forward pass
                tensor.fill_(initial)

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after, always_call=True)


def _delayed_scaling(module: torch.nn.Module) -> Iterator[tuple[torch.Tensor, float]]:
    """Scales and amax histories of the forward pass, each with its initial value."""
    for layer in module.modules():
        state: Any = getattr(layer, "fp8_meta", {}).get("scaling_fwd")
        if hasattr(state, "amax_history"):
            yield state.scale, 1.0
            yield state.amax_history, 0.0
