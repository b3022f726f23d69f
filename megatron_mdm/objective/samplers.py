"""Samplers of the masking rate t: from a quantile to t and its importance weight 1/q(t)."""

from typing import Protocol

import torch


class RateSampler(Protocol):
    """A density q on (0, 1], sampled through its inverse distribution function.

    The contract: t = Q^-1(quantile) and weight = 1/q(t) with exactly the density q that Q^-1
    samples, so that the mean of weight * f(t) over uniform quantiles is the integral of f.
    """

    def __call__(self, quantile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(t, weight), float64, of the shape of `quantile`, which lies in (0, 1)."""
        ...


class Uniform:
    """t ~ U(0, 1): q = 1 (method of LLaDA; `standard` in arXiv 2511.18159)."""

    def __call__(self, quantile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(quantile, 1)."""
        return quantile, torch.ones_like(quantile)


def build_sampler(name: str) -> RateSampler:
    """The sampler that `--mdm-rate-sampler` names."""
    return {"uniform": Uniform}[name]()
