"""One call from clean rows to masked rows: what the forward step, tools and tests share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from megatron_mdm.objective.masks import bernoulli_mask, exact_count_mask, isad_mask
from megatron_mdm.objective.randomness import to_unit
from megatron_mdm.objective.segments import to_positions

# From quantiles to (t, weight), as a `RateSampler` does it; its density may change between calls.
Sampler = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Corruption:
    """B masked rows of L positions, each with one rate, or one for each of its segments.

    Attributes:
        tokens: x_m, int64 [B, L]: the clean tokens with the mask token at masked positions.
        mask: bool [B, L].
        weight: importance weight of t times the weight of the mask, float64 [B, 1] or [B, L].
        t: masking rates, float64 [B], or [B, L] with segments.
        rate_weight: importance weight 1/q(t) alone, of the shape of `t`.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    weight: torch.Tensor
    t: torch.Tensor
    rate_weight: torch.Tensor

    @property
    def largest_weight(self) -> torch.Tensor:
        """Largest weight of a masked token in each row, float64 [B]; 0 where none is masked."""
        return torch.where(self.mask, self.weight, 0.0).amax(dim=1)


@dataclass(frozen=True)
class Corrupter:
    """Draws rates and masks from the rows' own random numbers; deterministic.

    Attributes:
        sampler: of t.
        mask_kind: `bernoulli` or `exact-count`.
        mask_token_id: id put at masked positions.
        eps: least masking probability of Bernoulli masks.
        isad_token_ids: tokens that ISAD masks more often; Bernoulli masks only.
        isad_delta: what ISAD adds to their masking probability.
        isad_weight: see `isad_mask`.
    """

    sampler: Sampler
    mask_kind: Literal["bernoulli", "exact-count"]
    mask_token_id: int
    eps: float
    isad_token_ids: tuple[int, ...] = ()
    isad_delta: float = 0.0
    isad_weight: Literal["inclusion", "exact"] = "inclusion"
    # `isad_token_ids` in ascending order on each device that has asked.
    _ids: dict[torch.device, torch.Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __call__(
        self,
        tokens: torch.Tensor,
        eligible: torch.Tensor,
        uniforms: torch.Tensor,
        quantile: torch.Tensor,
        segments: torch.Tensor | None = None,
    ) -> Corruption:
        """Masks rows.

        Args:
            tokens: clean tokens x0, int64 [B, L].
            eligible: positions that may be masked, bool [B, L].
            uniforms: grid integers (see randomness.py), int64 [B, L].
            quantile: grid integers, int64 [B], or [B, L] with segments.
            segments: see objective/segments.py; None: each row has one rate.
        """
        t, rate_weight = self.sampler(to_unit(quantile))
        mask, mask_weight = self._mask(tokens, eligible, to_unit(uniforms), t, segments)
        return Corruption(
            tokens=torch.where(mask, self.mask_token_id, tokens),
            mask=mask,
            weight=to_positions(rate_weight, segments) * mask_weight,
            t=t,
            rate_weight=rate_weight,
        )

    def _mask(
        self,
        tokens: torch.Tensor,
        eligible: torch.Tensor,
        u: torch.Tensor,
        t: torch.Tensor,
        segments: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.isad_token_ids:
            isad = self.isad_delta, self.isad_weight
            return isad_mask(u, eligible, t, self.eps, self._chosen(tokens), *isad, segments)
        if self.mask_kind == "exact-count":
            return exact_count_mask(u, eligible, t, segments)
        return bernoulli_mask(u, eligible, t, self.eps, segments)

    def _chosen(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens that ISAD masks more often, bool [B, L]."""
        # Copied to a device once: a copy for every micro-batch would make the host wait for it.
        ids = self._ids.get(tokens.device)
        if ids is None:
            ids = torch.tensor(sorted(self.isad_token_ids), device=tokens.device)
            self._ids[tokens.device] = ids
        # torch.isin would ask the device how many different tokens there are if the ids are many.
        place = torch.searchsorted(ids, tokens).clamp(max=len(ids) - 1)
        return ids[place] == tokens
