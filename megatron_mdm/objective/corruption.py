"""From clean rows to masked rows in one call, which the forward step, tools and tests share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from megatron_mdm.objective.masks import bernoulli_mask, exact_count_mask, isad_mask
from megatron_mdm.objective.randomness import to_unit
from megatron_mdm.objective.segments import counts, to_positions

# quantiles -> (t, weight), like a call of a `RateSampler`; the density may change between calls.
Sampler = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Corruption:
    """B masked rows of L positions, with one masking rate per row or per segment.

    Attributes:
        tokens: x_m, int64 [B, L]: the clean tokens with the mask token at masked positions.
        mask: which positions are masked, bool [B, L].
        weight: importance weight of t times the weight of the mask, float64 [B, 1] or [B, L].
        t: masking rates, float64 [B], or [B, L] with segments.
        rate_weight: importance weight 1/q(t) alone, of the shape of `t`.
        draw_weight: the importance weight that the loss has: `rate_weight`, or the weight of the
            drawn count (see `Corrupter.count_weight`), of the shape of `t`.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    weight: torch.Tensor
    t: torch.Tensor
    rate_weight: torch.Tensor
    draw_weight: torch.Tensor

    @property
    def largest_weight(self) -> torch.Tensor:
        """Largest weight of a masked token in each row, float64 [B]; 0 where none is masked."""
        return torch.where(self.mask, self.weight, 0.0).amax(dim=1)


@dataclass(frozen=True)
class Corrupter:
    """Draws rates and masks from random numbers that the rows carry; deterministic.

    Attributes:
        sampler: sampler of t.
        mask_kind: `bernoulli` or `exact-count`.
        mask_token_id: token id that replaces masked tokens.
        eps: least masking probability of Bernoulli masks.
        isad_token_ids: tokens that ISAD masks more often; for Bernoulli masks only.
        isad_delta: ISAD adds this to their masking probability.
        isad_weight: see `isad_mask`.
        count_weight: importance weight of a count, given the count and the number of eligible
            tokens, for exact counts only; see `samplers.count_weight`. It replaces that of t. None:
            the loss has the importance weight of t.
    """

    sampler: Sampler
    mask_kind: Literal["bernoulli", "exact-count"]
    mask_token_id: int
    eps: float
    isad_token_ids: tuple[int, ...] = ()
    isad_delta: float = 0.0
    isad_weight: Literal["inclusion", "exact"] = "inclusion"
    count_weight: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    # `isad_token_ids` in ascending order, on each device that was used.
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
        draw_weight = rate_weight
        if self.count_weight is not None:
            draw_weight = self.count_weight(counts(mask, segments), counts(eligible, segments))
        return Corruption(
            tokens=torch.where(mask, self.mask_token_id, tokens),
            mask=mask,
            weight=to_positions(draw_weight, segments) * mask_weight,
            t=t,
            rate_weight=rate_weight,
            draw_weight=draw_weight,
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
        """Positions of tokens that ISAD masks more often, bool [B, L]."""
        # One copy per device. A copy per micro-batch would make the host wait for the device.
        ids = self._ids.get(tokens.device)
        if ids is None:
            ids = torch.tensor(sorted(self.isad_token_ids), device=tokens.device)
            self._ids[tokens.device] = ids
        # With many ids, torch.isin makes the host wait: it needs the number of distinct tokens.
        place = torch.searchsorted(ids, tokens).clamp(max=len(ids) - 1)
        return ids[place] == tokens
