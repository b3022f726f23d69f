"""The same network under a causal mask, as an autoregressive model: for comparisons."""

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.transformer.enums import AttnMaskType


@contextlib.contextmanager
def causal_attention(model: torch.nn.Module) -> Iterator[None]:
    """Context in which the attention of `model` is causal."""
    kinds = {m: m.attn_mask_type for m in model.modules() if hasattr(m, "attn_mask_type")}
    for module in kinds:
        module.attn_mask_type = AttnMaskType.causal
    try:
        yield
    finally:
        for module, kind in kinds.items():
            module.attn_mask_type = kind
