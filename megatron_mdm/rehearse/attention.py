"""Attention that stands in for Transformer Engine's under context parallelism."""

from collections.abc import Callable
from typing import Any

import torch


class OwnPositionsAttention(torch.nn.Module):
    """Full attention among the positions that one context-parallel rank holds.

    It takes the place of a core attention of Megatron.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Returns [s, b, heads * channels]; q is [s, b, heads, channels], k and v have groups."""
        parts = [part.permute(1, 2, 0, 3) for part in (q, k, v)]
        found = torch.nn.functional.scaled_dot_product_attention(*parts, enable_gqa=True)
        return found.permute(2, 0, 1, 3).flatten(2)


def with_own_positions(make_spec: Callable[..., Any]) -> Callable[..., Any]:
    """Changes a function that makes layer specs: its layers get `OwnPositionsAttention`."""

    def make(*args: Any, **kwargs: Any) -> Any:
        spec = make_spec(*args, **kwargs)
        for layer in getattr(spec, "layer_specs", [spec]):
            layer.submodules.self_attention.submodules.core_attention = OwnPositionsAttention
        return spec

    return make
