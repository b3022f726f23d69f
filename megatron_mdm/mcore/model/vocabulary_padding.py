"""Rows of the vocabulary that are padding take no part in the softmax."""

from typing import Any

import torch
from megatron.core import mpu


def mask_padded_vocabulary(model: torch.nn.Module, vocab_size: int) -> None:
    """Gives the logits of padding the least value there is, so that the softmax leaves them out.

    Their gradient is then 0, which the cross entropy computes as such: nothing has to be added to
    the backward pass. A rank that holds nothing but padding still has finite logits.

    Args:
        model: Megatron's, one stage of it.
        vocab_size: rows that are tokens.
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
