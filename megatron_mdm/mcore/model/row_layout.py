"""Concatenates the rows of a micro-batch, as attention kernels for varying lengths expect them."""

from collections.abc import Callable

import torch


def attend_in_documents(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """Concatenates the rows of a micro-batch, attends, and restores the layout.

    Args:
        attend: maps query, key and value [b s, heads, head size] to one tensor [b s, ...].
        query: [s, b, heads, head size].
        key: [s, b, groups, head size].
        value: [s, b, groups, head size].

    Returns:
        [s, b, heads * head size].
    """
    s, b = query.shape[:2]
    flat = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
    return attend(*flat).reshape(b, s, -1).transpose(0, 1).contiguous()
