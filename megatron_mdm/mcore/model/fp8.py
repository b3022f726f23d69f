"""FP8: evaluations leave its scales alone, and models without it load checkpoints with them.

Scales go into checkpoints as Transformer Engine keeps them, and are left there by models without.

Transformer Engine's delayed scaling follows the largest entries that tensors had. Without gradients
it does not update scales, but each tensor that it rounds still enters its largest entry into the
history, from which the next training step's scale then follows: rows of an evaluation would have a
say in training, and two runs that evaluate at different times would differ.
"""

from collections.abc import Iterator
from typing import Any

import torch


def ignore_fp8_state_on_load(model: torch.nn.Module) -> None:
    """Makes a model without delayed scaling load checkpoints of models with it.

    Transformer Engine would refuse their scales, a pickle, although nothing needs them.

    Args:
        model: with layers of either implementation.
    """

    def leave_out(_: Any, state: dict[str, Any], *__: Any) -> None:
        for name in state:
            if name.rpartition(".")[2].startswith("_extra_state"):
                state[name] = None

    model.register_load_state_dict_pre_hook(leave_out)


def keep_scales_in_evaluation(model: torch.nn.Module) -> None:
    """Makes forward passes in evaluation mode leave the state of delayed scaling as it was.

    They compute in FP8 as training does, with the scales of training. What they enter is taken back
    afterwards, with two small copies for each layer; other recipes have no such state.

    Args:
        model: holds Transformer Engine's modules.
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
            if id(tensor) not in known:  # made by this pass
                tensor.fill_(initial)

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after, always_call=True)


def _delayed_scaling(module: torch.nn.Module) -> Iterator[tuple[torch.Tensor, float]]:
    """Scales and histories of the forward pass, with what Transformer Engine begins them with."""
    for layer in module.modules():
        state: Any = getattr(layer, "fp8_meta", {}).get("scaling_fwd")
        if hasattr(state, "amax_history"):
            yield state.scale, 1.0
            yield state.amax_history, 0.0
