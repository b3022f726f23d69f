"""The rows of a micro-batch laid one after another, as kernels for varying lengths take them."""

from collections.abc import Callable

import torch


def attend_in_documents(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """Lays the rows of a micro-batch one after another for attention, and back.

    Args:
        attend: from three tensors [b s, heads, head size] to one [b s, ...].
        query: [s, b, heads, head size].
        key: [s, b, groups, head size].
        value: [s, b, groups, head size].

    Returns:
        [s, b, heads * head size].
    """
    s, b = query.shape[:2]
    flat = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
    return attend(*flat).reshape(b, s, -1).transpose(0, 1).contiguous()
