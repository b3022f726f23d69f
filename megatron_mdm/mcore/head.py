"""The head as GPTModel runs it, with a look at the gradient of the final hidden states."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import mpu


def head_with_gradient_norms(
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    compute_language_model_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scale_logits: Callable[[torch.Tensor], torch.Tensor],
    config: Any,
    context: Callable[[torch.Tensor], None],
    **_: Any,
) -> torch.Tensor:
    """Megatron's `output_processor`: cross entropies, and gradient norms when backward passes by.

    Costs no pass of its own: the gradient at the hidden states [s, b, h] is on its way anyhow.

    Args:
        hidden_states: [s, b, h], or a part of the positions under sequence parallelism.
        output_layer: Megatron's.
        output_weight: shared with the embedding, or None.
        labels: clean tokens, int64 [b, s].
        compute_language_model_loss: GPTModel's.
        scale_logits: GPTModel's.
        config: Megatron's transformer configuration.
        context: called in the backward pass with the norm of the gradient of the micro-batch's loss
            sum at each row, float32 [b], the same on all tensor-parallel ranks.

    Returns:
        Cross entropies, float [b, s], nats.
    """

    def look(gradient: torch.Tensor) -> None:
        squares = gradient.detach().float().square().sum(dim=(0, 2))
        if output_layer.sequence_parallel:  # each rank has a part of the positions
            group = mpu.get_tensor_model_parallel_group()
            torch.distributed.all_reduce(squares, group=group)
        scale = config.grad_scale_func(torch.ones_like(squares)) if config.grad_scale_func else 1.0
        context(squares.sqrt() / scale)

    if hidden_states.requires_grad:
        hidden_states.register_hook(look)
    logits, _ = output_layer(hidden_states, weight=output_weight)
    return compute_language_model_loss(labels, scale_logits(logits))
