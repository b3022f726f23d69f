"""Excludes padding rows of the vocabulary from the softmax."""

from typing import Any

import torch
from megatron.core import mpu


def mask_padded_vocabulary(model: torch.nn.Module, vocab_size: int) -> None:
    """Sets the logits of padding rows to the dtype's minimum, so their softmax probability is 0.

    The cross entropy then computes a gradient of 0 for them, so the backward pass needs no change.
    The minimum is finite, so a rank that holds only padding rows still has finite logits.

    Args:
        model: one stage of Megatron's model.
        vocab_size: number of rows that are tokens.
    """
    if getattr(model, "output_layer", None) is None or not model.post_process:
        return
    layer: Any = model.output_layer

    def leave_out(_: Any, __: Any, output: tuple[torch.Tensor, Any]) -> None:
        logits = output[0].detach()
        is_whole = logits.shape[-1] == layer.output_size
        first = 0 if is_whole else mpu.get_tensor_model_parallel_rank() * logits.shape[-1]
        logits[..., max(0, vocab_size - first) :].fill_(torch.finfo(logits.dtype).min)

    layer.register_forward_hook(leave_out)
