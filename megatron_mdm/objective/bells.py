"""Bell-shaped densities of the masking rate, mixed with the uniform density.

A rising share of the uniform density fades a bell out. Sources: arXiv 2605.13026 has a logit-normal
t, and arXiv 2601.22450 a tuned distribution of the rate.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from scipy.special import betaln, expit, xlogy

from megatron_mdm.objective.bell_limits import LEAST_PROPOSAL_SHARE, check_bell
from megatron_mdm.objective.samplers import Tables, cumulated, integrate, interpolate, invert
from megatron_mdm.objective.types import Floats

BellRole = Literal["objective", "proposal", "weight"]

# All bells are tabulated at the same rates, which are equally spaced in logit t, and at 0 and 1.
# The interpolation error of a logit-normal with STD 0.2 to 3 is below 1e-3 of its maximum; with STD
# 0.1 it is 2e-3. `bell_limits.py` rejects an STD below 0.1 or above 3.
_LOGITS = np.linspace(-24.0, 24.0, 4097)
_EDGES: Floats = expit(np.concatenate([[-np.inf], _LOGITS, [np.inf]]))


@dataclass(frozen=True)
class Bell:
    """The density w(t) = (1 - share) bell(t) + share, linear between fixed edges.

    The role defines how w affects the objective:

        `objective`: t ~ w with weight 1. The objective is the mean of the loss under density w.
        `weight`: t ~ U(0, 1) with weight w(t). The same objective, with uniform draws of t.
        `proposal`: t ~ w with weight 1/w(t). The objective stays the uniform mean over all rates.

    `objective` and `weight` CHANGE THE OBJECTIVE: their loss is not a bound on the likelihood. With
    share 1, every role equals `Uniform` bit for bit.

    Attributes:
        tables: edges, values of the bell at the edges, and its integrals from 0 to the edges, on
            any device. Values and integrals of w are linear in the share, so that one set of tables
            serves all shares.
        role: `objective`, `weight` or `proposal`.
        share: share of the uniform density, in (0, 1].
    """

    tables: Tables
    role: BellRole
    share: float

    @classmethod
    def of(
        cls,
        name: str,
        parameters: list[float],
        role: BellRole = "objective",
        share: float = LEAST_PROPOSAL_SHARE,
    ) -> "Bell":
        """Makes a bell from its name and its parameters; see `check_bell`.

        Raises:
            UserError: see `check_bell`.
        """
        check_bell(name, parameters)
        density = {"logit-normal": _logit_normal, "beta": _beta}[name](*parameters)
        density = density / cumulated(_EDGES, density)[-1]
        return cls(Tables(_EDGES, density, cumulated(_EDGES, density)), role, share)

    def with_share(self, share: float) -> "Bell":
        """A copy with another share of the uniform density."""
        return replace(self, share=share)

    def __call__(self, quantile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(t, weight), float64, on the device of `quantile`."""
        if self.share == 1.0 or self.role == "weight":
            return quantile, self.weight(quantile)
        t, w = invert(*self._mixed(quantile.device), quantile)
        return t, 1.0 / w if self.role == "proposal" else torch.ones_like(w)

    def density(self, t: torch.Tensor) -> torch.Tensor:
        """The density that t is drawn from: w(t), or 1 in the role `weight`."""
        return torch.ones_like(t) if self.role == "weight" else self._w(t)

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """The weight of a row at rate t: 1, w(t) or 1/w(t), by the role."""
        if self.role == "objective":
            return torch.ones_like(t)
        return self._w(t) if self.role == "weight" else 1.0 / self._w(t)

    def cdf(self, t: torch.Tensor) -> torch.Tensor:
        """The distribution function of `density`."""
        return t if self.role == "weight" else self._integral(t)

    def objective_mass(self, t: torch.Tensor) -> torch.Tensor:
        """The integral of density times weight from 0 to t."""
        return t if self.role == "proposal" else self._integral(t)

    @property
    def breaks(self) -> list[float]:
        """Quantiles of the edges; see `RateSampler.breaks`."""
        if self.share == 1.0:
            return [0.0, 1.0]
        edges, _, cdf = self._mixed(torch.device("cpu"))
        inner = (edges if self.role == "weight" else cdf)[1:-1]
        return [0.0, *inner.tolist(), 1.0]

    def _w(self, t: torch.Tensor) -> torch.Tensor:
        if self.share == 1.0:
            return torch.ones_like(t)
        edges, values, _ = self._mixed(t.device)
        return interpolate(edges, values, t)

    def _integral(self, t: torch.Tensor) -> torch.Tensor:
        """The integral of w from 0 to t."""
        return t if self.share == 1.0 else integrate(*self._mixed(t.device), t)

    def _mixed(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Edges, values of w at the edges, and integrals of w from 0 to the edges."""
        edges, values, cdf = self.tables.on(device)
        bell = 1.0 - self.share
        return edges, bell * values + self.share, bell * cdf + self.share * edges


def faded_share(share: float, start: int, end: int, finished: int) -> float:
    """The share of the uniform density in an iteration, while a bell fades out.

    The share rises linearly from its initial value to 1. `start`, `end` and `finished` count
    iterations, or samples.

    Args:
        share: initial share, in (0, 1].
        start: the rise begins after so many.
        end: the share is 1 after so many.
        finished: number finished before this iteration.
    """
    if finished >= end:
        return 1.0
    risen = max(0, finished - start) / max(1, end - start)
    return share + (1.0 - share) * risen


def _logit_normal(mean: float, std: float) -> Floats:
    """Density at the edges of a t whose logit is normal."""
    z = (_LOGITS - mean) / std
    density = np.exp(-z * z / 2) / (std * math.sqrt(2 * math.pi) * expit(_LOGITS) * expit(-_LOGITS))
    return np.pad(density, 1)


def _beta(a: float, b: float) -> Floats:
    """Density of Beta(a, b) at the edges."""
    density: Floats = np.exp(xlogy(a - 1, _EDGES) + xlogy(b - 1, _EDGES[::-1]) - betaln(a, b))
    return density
