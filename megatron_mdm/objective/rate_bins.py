"""Masked rows that estimate E[value^2 | t in a bin] from draws of the number of masked tokens.

The model does not see t. With Bernoulli masks, a row's value is therefore F(m) / p(t), where F
depends only on the mask m: on the number k of masked tokens and on their positions. Integration
over t in a bin gives

    E[value^2 | bin] = sum_{k >= 1} omega_k E[(L_e/k)^2 F(m)^2 | k],
    omega_k = mean over the bin of  Binomial(k; L_e, p) (k / (L_e p))^2,

where (L_e/k) F is the value with an exact-count mask.

If t itself were drawn, few draws would hold most of this sum: near t = 0 a row rarely has a masked
token, and then counts with 1/p^2. The estimate from 100 draws in the first of 30 bins, with rows of
32 tokens, has a relative error of 0.7, and one in 20 such estimates is wrong by a factor of 2.6.
This module therefore never draws t. It draws k from a distribution pi and weights the draw by
omega_k / pi_k. With exact-count masks, omega_k is the share of the bin whose rates give this k.

For the norm of a gradient, E[value^2 | k] is proportional to 1/k, because each masked token adds a
vector in its own direction. pi_k proportional to omega_k / k then gives all draws about the same
contribution. A loss is a mean over the masked tokens, so pi_k is proportional to omega_k.
"""

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from scipy.special import betainc

from megatron_mdm.objective.corruption import Corruption
from megatron_mdm.objective.masks import exact_count_mask
from megatron_mdm.objective.randomness import to_unit
from megatron_mdm.objective.segments import counts, to_positions
from megatron_mdm.objective.types import Floats


def mask_for_bins(
    tokens: torch.Tensor,
    eligible: torch.Tensor,
    uniforms: torch.Tensor,
    bins: torch.Tensor,
    places: torch.Tensor,
    segments: torch.Tensor | None,
    *,
    num_bins: int,
    mask_kind: Literal["bernoulli", "exact-count"],
    mask_token_id: int,
    eps: float,
    target: Literal["loss", "gradient"],
) -> Corruption:
    """Masks rows so that the mean square of their values is E[value^2 | bin].

    Args:
        tokens: clean tokens x0, int64 [B, L].
        eligible: positions that may be masked, bool [B, L].
        uniforms: uniforms of the positions, as grid integers, int64 [B, L].
        bins: bin of t, from 0, of each row, int64 [B], or of each segment [B, L].
        places: quantiles of the number of masked tokens, as grid integers, of the shape of `bins`.
        segments: see objective/segments.py; None: each row has one bin.
        num_bins: number of equal bins of t.
        mask_kind: kind of mask in training.
        mask_token_id: token id that replaces masked tokens.
        eps: least masking probability of Bernoulli masks.
        target: the value that is measured: the loss, or the norm of the gradient.

    Returns:
        Masked rows. `t` is the middle of the bin, and `rate_weight` is 1. With `weight`, the mean
        of the squared value is unbiased; the mean of the value itself is not.
    """
    num_eligible = counts(eligible, segments)
    rates, factors = np.zeros(num_eligible.shape), np.ones(num_eligible.shape)
    columns = [x.cpu().numpy() for x in (num_eligible, bins, to_unit(places))]
    for at in zip(*np.nonzero(columns[0]), strict=True):
        length, index, quantile = (column[at] for column in columns)
        k, omega = count_weights(mask_kind, int(length), int(index), num_bins, eps)
        pi = omega / k if target == "gradient" else omega
        pi = pi / pi.sum()
        drawn = min(int(np.searchsorted(pi.cumsum(), quantile, "right")), len(k) - 1)
        rates[at] = (k[drawn] - 0.5) / length
        factors[at] = np.sqrt(omega[drawn] / pi[drawn])
    rate, factor = (torch.from_numpy(x).to(tokens.device) for x in (rates, factors))
    mask, weight = exact_count_mask(to_unit(uniforms), eligible, rate, segments)
    return Corruption(
        tokens=torch.where(mask, mask_token_id, tokens),
        mask=mask,
        weight=to_positions(factor, segments) * weight,
        t=(bins.to(torch.float64) + 0.5) / num_bins,
        rate_weight=torch.ones_like(rate),
        draw_weight=torch.ones_like(rate),
    )


@lru_cache(maxsize=4096)
def count_weights(
    mask_kind: Literal["bernoulli", "exact-count"],
    num_eligible: int,
    index: int,
    num_bins: int,
    eps: float,
) -> tuple[Floats, Floats]:
    """The numbers k of masked tokens with positive weight omega_k in a bin, and these weights.

    Args:
        mask_kind: kind of mask in training.
        num_eligible: L_e, at least 1.
        index: number of the bin, from 0.
        num_bins: number of equal bins of t.
        eps: least masking probability of Bernoulli masks.

    Returns:
        k and omega_k, of equal length, float64.
    """
    L = num_eligible
    k = np.arange(1.0, L + 1)
    low, high = index / num_bins, (index + 1) / num_bins
    if mask_kind == "exact-count":
        omega = (np.minimum(k / L, high) - np.maximum((k - 1) / L, low)).clip(min=0.0) * num_bins
    else:
        low, high = (min((1 - eps) * t + eps, 1.0) for t in (low, high))
        omega = np.empty(L)
        # Integrals of p^(k-2) (1-p)^(L-k): an incomplete beta function for k >= 2; for k = 1 a
        # logarithm minus a sum.
        j = k[:-1]
        beta = betainc(j, L - j, high) - betainc(j, L - j, low)
        omega[1:] = (j + 1) / j * beta
        series = (((1 - low) ** j - (1 - high) ** j) / j).sum()
        omega[0] = np.log(high / low) - series
        omega *= 1 / (L * (high - low))
    some = omega > 1e-12 * omega.max()
    return k[some], omega[some]
