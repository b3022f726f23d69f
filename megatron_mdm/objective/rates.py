"""From the masking rate t to the masking probability p(t) and the number of masked tokens k(t)."""

import torch


def masking_probability(t: torch.Tensor, eps: float) -> torch.Tensor:
    """p(t) = (1 - eps) t + eps, float64, in (0, 1] (LLaDA, arXiv 2502.09992, Algorithm 1).

    Args:
        t: masking rates in (0, 1].
        eps: lower bound of p(t), in (0, 1).
    """
    return (1.0 - eps) * t + eps


def masked_count(t: torch.Tensor, num_eligible: torch.Tensor) -> torch.Tensor:
    """Number of masked tokens, k = ceil(t L_e), int64; 0 where L_e = 0.

    If t is uniform, every k in 1..L_e is equally likely.

    Args:
        t: masking rates in (0, 1], float64.
        num_eligible: L_e, int64, of the shape of `t`.
    """
    k = torch.ceil(t * num_eligible).to(torch.int64)
    # In exact arithmetic 1 <= k <= L_e because 0 < t <= 1. The bounds only guard against rounding.
    return torch.minimum(k.clamp(min=1), num_eligible)
