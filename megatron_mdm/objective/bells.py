"""Bell-shaped densities of the masking rate, mixed with the uniform; a share that fades a bell out.

The sources: logit-normal t in arXiv 2605.13026, a tuned distribution of the rate in 2601.22450.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from scipy.special import betaln, expit, xlogy

from megatron_mdm.objective.bell_limits import LEAST_PROPOSAL_SHARE, check_bell
from megatron_mdm.objective.samplers import Tables, cumulated, interpolate, invert
from megatron_mdm.objective.types import Floats

BellRole = Literal["objective", "proposal", "weight"]

# All bells are tabulated at the same rates, equally spaced in logit t, and at 0 and 1. Between them
# a logit-normal of STD 0.2 to 3 is off by less than 1e-3 of its maximum, and one of 0.1 by 2e-3;
# `bell_limits.py` keeps others away.
_LOGITS = np.linspace(-24.0, 24.0, 4097)
_EDGES: Floats = expit(np.concatenate([[-np.inf], _LOGITS, [np.inf]]))


@dataclass(frozen=True)
class Bell:
    """The density w(t) = (1 - share) bell(t) + share, linear between fixed edges.

    Its role says what it does to the objective:

        `objective`: t ~ w with weight 1. The objective is the mean of the loss over w.
        `weight`: t ~ U(0, 1) with weight w(t). The same objective, sampled otherwise.
        `proposal`: t ~ w with weight 1/w(t). The objective stays the mean over all rates.

    The first two CHANGE THE OBJECTIVE: their loss is no bound on the likelihood. With share 1 every
    role is `Uniform` bit for bit.

    Attributes:
        tables: edges, values of the bell there and its integrals up to them, on any device. Values
            and integrals of w are linear in the share, so that all shares have the same tables.
        role: what it does to the objective.
        share: of the uniform density, in (0, 1].
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
        """A bell by its name and its parameters; see `check_bell`.

        Raises:
            UserError: see `check_bell`.
        """
        check_bell(name, parameters)
        density = {"logit-normal": _logit_normal, "beta": _beta}[name](*parameters)
        density = density / cumulated(_EDGES, density)[-1]
        return cls(Tables(_EDGES, density, cumulated(_EDGES, density)), role, share)

    def with_share(self, share: float) -> "Bell":
        """The same bell with another share of the uniform density."""
        return replace(self, share=share)

    def __call__(self, quantile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(t, weight), float64, on the device of `quantile`."""
        if self.share == 1.0 or self.role == "weight":
            return quantile, self.weight(quantile)
        t, w = invert(*self._mixed(quantile.device), quantile)
        return t, 1.0 / w if self.role == "proposal" else torch.ones_like(w)

    def density(self, t: torch.Tensor) -> torch.Tensor:
        """Density that t is drawn from: w(t), or 1 where w is the weight."""
        return torch.ones_like(t) if self.role == "weight" else self._w(t)

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """1, w(t) or 1/w(t); see the roles."""
        if self.role == "objective":
            return torch.ones_like(t)
        return self._w(t) if self.role == "weight" else 1.0 / self._w(t)

    @property
    def breaks(self) -> list[float]:
        """The distribution function at the edges."""
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

    def _mixed(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Edges, values of w there, and its integrals up to them."""
        edges, values, cdf = self.tables.on(device)
        bell = 1.0 - self.share
        return edges, bell * values + self.share, bell * cdf + self.share * edges


def faded_share(share: float, start: int, end: int, finished: int) -> float:
    """The share of the uniform density in an iteration, while a bell fades out.

    Args:
        share: before the fade, in (0, 1].
        start: iterations, or samples, after which it begins to rise, linearly.
        end: those after which it is 1.
        finished: those before the iteration.
    """
    if finished >= end:
        return 1.0
    risen = max(0, finished - start) / max(1, end - start)
    return share + (1.0 - share) * risen


def _logit_normal(mean: float, std: float) -> Floats:
    """Density of t at the edges, whose logit is normal."""
    z = (_LOGITS - mean) / std
    density = np.exp(-z * z / 2) / (std * math.sqrt(2 * math.pi) * expit(_LOGITS) * expit(-_LOGITS))
    return np.pad(density, 1)


def _beta(a: float, b: float) -> Floats:
    """Density of Beta(a, b) at the edges."""
    density: Floats = np.exp(xlogy(a - 1, _EDGES) + xlogy(b - 1, _EDGES[::-1]) - betaln(a, b))
    return density
