"""One call from clean rows to masked rows: what the forward step, tools and tests share."""

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_mdm.objective.masks import draw_mask
from megatron_mdm.objective.randomness import to_unit
from megatron_mdm.objective.samplers import RateSampler


@dataclass(frozen=True)
class Corruption:
    """B masked rows of L positions.

    Attributes:
        tokens: x_m, int64 [B, L]: the clean tokens with the mask token at masked positions.
        mask: bool [B, L].
        weight: importance weight of t times the weight of the mask, float64 [B].
        t: masking rates, float64 [B].
        rate_weight: importance weight 1/q(t) alone, float64 [B].
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    weight: torch.Tensor
    t: torch.Tensor
    rate_weight: torch.Tensor


def corrupt(
    tokens: torch.Tensor,
    eligible: torch.Tensor,
    uniforms: torch.Tensor,
    quantile: torch.Tensor,
    *,
    sampler: RateSampler,
    mask_kind: Literal["bernoulli", "exact-count"],
    mask_token_id: int,
    eps: float,
) -> Corruption:
    """Draws rates and masks from the rows' own random numbers; deterministic.

    Args:
        tokens: clean tokens x0, int64 [B, L].
        eligible: positions that may be masked, bool [B, L].
        uniforms: grid integers (see randomness.py), int64 [B, L].
        quantile: grid integers, int64 [B].
        sampler: sampler of t.
        mask_kind: `bernoulli` or `exact-count`.
        mask_token_id: id put at masked positions.
        eps: least masking probability of Bernoulli masks.
    """
    t, rate_weight = sampler(to_unit(quantile))
    mask, mask_weight = draw_mask(mask_kind, to_unit(uniforms), eligible, t, eps)
    return Corruption(
        tokens=torch.where(mask, mask_token_id, tokens),
        mask=mask,
        weight=rate_weight * mask_weight,
        t=t,
        rate_weight=rate_weight,
    )
