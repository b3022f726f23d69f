"""Attention that stands in for Transformer Engine's under context parallelism."""

from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.model.layer_specs import make_bidirectional


class OwnPositionsAttention(torch.nn.Module):
    """Full attention among the positions that one context-parallel rank holds.

    It takes the place of a core attention of Megatron.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Returns [s, b, heads * channels]; q is [s, b, heads, channels], k and v have groups."""
        q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return found.permute(2, 0, 1, 3).flatten(2)


def use_own_positions(attention: ModuleSpec, mdm: MDMConfig, transformer: Any) -> None:
    """`make_bidirectional`, after which the self-attention has `OwnPositionsAttention`."""
    make_bidirectional(attention, mdm, transformer)
    attention.submodules.core_attention = OwnPositionsAttention
