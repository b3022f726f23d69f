"""Masks of rows and their Horvitz-Thompson weights, from uniforms and rates.

Shapes: B rows of L positions. A row without a masked token is legitimate: its loss is 0 and counts.
"""

from typing import Literal

import torch

from megatron_mdm.objective.rates import masked_count, masking_probability


def bernoulli_mask(
    u: torch.Tensor, eligible: torch.Tensor, t: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks every eligible position independently where u_i < p(t).

    Args:
        u: uniforms in (0, 1), float64 [B, L].
        eligible: positions that may be masked, bool [B, L].
        t: masking rates, float64 [B].
        eps: see `masking_probability`.

    Returns:
        mask, bool [B, L], and the weight 1/p(t) of its tokens, float64 [B].
    """
    p = masking_probability(t, eps)
    return (u < p[:, None]) & eligible, 1.0 / p


def exact_count_mask(
    u: torch.Tensor, eligible: torch.Tensor, t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks the k = ceil(t L_e) eligible positions with the smallest uniforms.

    Args:
        u: uniforms in (0, 1), float64 [B, L].
        eligible: positions that may be masked, bool [B, L]; L_e of them in a row.
        t: masking rates, float64 [B].

    Returns:
        mask, bool [B, L], and the weight L_e/k of its tokens, float64 [B] (1 where L_e = 0).
    """
    num_eligible = eligible.sum(dim=1)
    k = masked_count(t, num_eligible)
    order = torch.where(eligible, u, 2.0).argsort(dim=1, stable=True)
    chosen = torch.arange(u.shape[1], device=u.device) < k[:, None]
    mask = torch.zeros_like(eligible).scatter(1, order, chosen)
    return mask, num_eligible.clamp(min=1).to(torch.float64) / k.clamp(min=1)


def draw_mask(
    kind: Literal["bernoulli", "exact-count"],
    u: torch.Tensor,
    eligible: torch.Tensor,
    t: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask that `--mdm-mask` names and its weights; see the two functions above."""
    if kind == "exact-count":
        return exact_count_mask(u, eligible, t)
    return bernoulli_mask(u, eligible, t, eps)
