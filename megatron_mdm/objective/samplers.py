"""Samplers of the masking rate t: from a quantile to t and its importance weight 1/q(t)."""

import hashlib
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch

from megatron_mdm.errors import UserError
from megatron_mdm.objective.types import Floats

# Largest difference of the integral of a table from 1. It allows for rounding and is far below the
# error of 1e-9 that a weight may have.
INTEGRAL_TOLERANCE = 1e-10


class RateSampler(Protocol):
    """A density q on (0, 1], sampled through its inverse distribution function.

    The contract: t = Q^-1(quantile) and weight = w(t), and q is exactly the density that Q^-1
    samples. The mean of weight * f(t) over uniform quantiles is then the integral of q w f. If w is
    1/q, this is the integral of f. Any other w changes the objective: q w is the density of the
    objective.
    """

    def __call__(self, quantile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(t, weight), float64, of the shape of `quantile`, which lies in (0, 1)."""
        ...

    def density(self, t: torch.Tensor) -> torch.Tensor:
        """q(t), float64, of the shape of `t`, which lies in (0, 1]."""
        ...

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """w(t), the weight of a row at rate t, float64, of the shape of `t`, in (0, 1]."""
        ...

    def cdf(self, t: torch.Tensor) -> torch.Tensor:
        """Q(t), the integral of q from 0 to t, float64, of the shape of `t`, in [0, 1]."""
        ...

    def objective_mass(self, t: torch.Tensor) -> torch.Tensor:
        """The integral of q w from 0 to t, float64, of the shape of `t`; t itself if w is 1/q."""
        ...

    @property
    def breaks(self) -> list[float]:
        """Quantiles from 0 to 1; between them t and weight are smooth functions of the quantile."""
        ...


def count_weight(
    sampler: RateSampler, count: torch.Tensor, num_eligible: torch.Tensor
) -> torch.Tensor:
    """Importance weight of a count k of masked tokens: the mean of w(t) over the t that give it.

    The exact count k = ceil(t n) of n eligible tokens has the probability
    P(k) = Q(k/n) - Q((k-1)/n). The mean of w is the mass of the objective between (k-1)/n and k/n,
    divided by P(k); if w is 1/q, this is 1 / (n P(k)). Given k, the mask does not depend on t, so
    the mean replaces w(t) without a change of the objective, and never has a higher variance. If
    n = 1 it is the total mass, exactly 1.

    Args:
        sampler: density of t.
        count: k, int64; at least 1 where `num_eligible` is positive.
        num_eligible: n, int64, of the shape of `count`.

    Returns:
        float64, of the shape of `count`; 1 where n is 0 or 1.
    """
    n = num_eligible.clamp(min=1)
    high, low = count / n.double(), (count - 1).clamp(min=0) / n.double()
    mass = sampler.objective_mass(high) - sampler.objective_mass(low)
    probability = sampler.cdf(high) - sampler.cdf(low)
    # Rounding may put t into a cell that a clipped density does not reach.
    return torch.where(num_eligible > 1, mass / probability.clamp(min=1e-300), 1.0)


class Uniform:
    """t ~ U(0, 1): q = 1 (method of LLaDA; `standard` in arXiv 2511.18159)."""

    breaks: ClassVar[list[float]] = [0.0, 1.0]

    def __call__(self, quantile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(quantile, 1)."""
        return quantile, torch.ones_like(quantile)

    def density(self, t: torch.Tensor) -> torch.Tensor:
        """1."""
        return torch.ones_like(t)

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """1."""
        return torch.ones_like(t)

    def cdf(self, t: torch.Tensor) -> torch.Tensor:
        """Q(t) = t."""
        return t

    def objective_mass(self, t: torch.Tensor) -> torch.Tensor:
        """The integral of 1."""
        return t


class Flat(Uniform):
    """t ~ U(0, 1) with weight 2t, so that all masked tokens have about the same weight.

    This CHANGES THE OBJECTIVE to one of density 2t: its loss is not a bound on the likelihood. 2t
    cancels the weight 1/t of a masked token, and has mean 1.
    """

    def __call__(self, quantile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(quantile, 2 quantile)."""
        return quantile, self.weight(quantile)

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """2t."""
        return 2.0 * t

    def objective_mass(self, t: torch.Tensor) -> torch.Tensor:
        """The integral of 2t."""
        return t * t


class Clipped:
    """t ~ U(low, high) with weight 1 (the clipped schedule of block diffusion, arXiv 2503.09573).

    This CHANGES THE OBJECTIVE: the loss is averaged over rates between `low` and `high` instead of
    all rates, and rates outside are never trained. The loss is therefore not a bound on the
    likelihood.
    """

    breaks: ClassVar[list[float]] = [0.0, 1.0]

    def __init__(self, low: float, high: float):
        if not 0.0 <= low < high <= 1.0:
            raise UserError(f"clipped rates need 0 <= low < high <= 1, got low {low}, high {high}")
        self.low, self.high = low, high

    def __call__(self, quantile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(low + (high - low) quantile, 1)."""
        t = self.low + (self.high - self.low) * quantile
        return t.clamp(max=self.high), torch.ones_like(quantile)

    def density(self, t: torch.Tensor) -> torch.Tensor:
        """1 / (high - low) between `low` and `high`, 0 outside."""
        inside = (t > self.low) & (t <= self.high)
        return inside.to(torch.float64) / (self.high - self.low)

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """1."""
        return torch.ones_like(t)

    def cdf(self, t: torch.Tensor) -> torch.Tensor:
        """The share of the interval below t."""
        return ((t - self.low) / (self.high - self.low)).clamp(0.0, 1.0)

    def objective_mass(self, t: torch.Tensor) -> torch.Tensor:
        """`cdf`."""
        return self.cdf(t)


class Tables:
    """Arrays that are copied only once to each device.

    A copy in every step would make the host wait for the device.
    """

    def __init__(self, *arrays: Floats) -> None:
        self._arrays = arrays
        self._copies: dict[torch.device, list[torch.Tensor]] = {}

    def on(self, device: torch.device) -> list[torch.Tensor]:
        """The copies of the arrays on a device, float64."""
        if device not in self._copies:
            self._copies[device] = [torch.tensor(array, device=device) for array in self._arrays]
        return self._copies[device]


def invert(
    edges: torch.Tensor, values: torch.Tensor, cdf: torch.Tensor, quantile: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverts the distribution function of a piecewise linear density: from quantiles to rates.

    The density is linear between its values at the edges. In a cell [e, e'] with slope c, let q be
    the density at e and r = quantile - Q(e). There the distribution function is a parabola. Its
    inverse and the density have the closed forms

        q(t) = sqrt(q^2 + 2 c r),    t = e + 2 r / (q + q(t)).

    Up to rounding, t increases strictly with the quantile where the density is positive.

    Args:
        edges: 0 = e_0 < ... < e_K = 1, float64 [K + 1].
        values: density at the edges, of integral 1, float64 [K + 1].
        cdf: its integral up to each edge, float64 [K + 1].
        quantile: float64, in (0, 1).

    Returns:
        (t, q(t)), float64, of the shape of `quantile`.
    """
    cell = _cell(cdf, quantile)
    start, end = edges[cell], edges[cell + 1]
    left, right = values[cell], values[cell + 1]
    slope = (right - left) / (end - start)
    below = quantile - cdf[cell]
    above = (cdf[cell + 1] - quantile).clamp(min=0.0)
    # Starting from the end where the density is lower, no term is negative, so none cancel.
    square = torch.where(
        slope > 0, left * left + 2 * slope * below, right * right - 2 * slope * above
    )
    # The bounds guard against rounding: 1/q <= 1 / (least value) holds exactly.
    q = square.sqrt().clamp(torch.minimum(left, right), torch.maximum(left, right))
    return torch.minimum(start + 2 * below / (left + q), end), q


def interpolate(edges: torch.Tensor, values: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Evaluates a density that is linear between its values at edges; float64, shape of `t`."""
    cell = _cell(edges, t)
    fraction = (t - edges[cell]) / (edges[cell + 1] - edges[cell])
    return torch.lerp(values[cell], values[cell + 1], fraction.to(torch.float64))


def integrate(
    edges: torch.Tensor, values: torch.Tensor, cdf: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """Integral from 0 to t of a piecewise linear density; the inverse of `invert`.

    Args:
        edges: see `invert`.
        values: see `invert`.
        cdf: see `invert`.
        t: float64, in [0, 1].

    Returns:
        float64, of the shape of `t`.
    """
    cell = _cell(edges, t)
    mean = (values[cell] + interpolate(edges, values, t)) / 2
    return cdf[cell] + (t - edges[cell]) * mean


class PiecewiseSampler:
    """A density that is linear between its values at K + 1 edges, sampled exactly; see `invert`.

    The weight is 1/q(t). Samplers with equal tables compare equal.

    Attributes:
        edges: 0 = e_0 < ... < e_K = 1, float64 [K + 1].
        values: density at the edges, positive, of integral 1, float64 [K + 1].
    """

    def __init__(self, edges: npt.ArrayLike, density: npt.ArrayLike):
        """Copies the arrays.

        Raises:
            ValueError: the arrays are not a positive density on (0, 1]; the message says why.
        """
        self.edges = np.array(edges, dtype=np.float64)
        self.values = np.array(density, dtype=np.float64)
        _check(self.edges, self.values)
        self.edges.setflags(write=False)
        self.values.setflags(write=False)
        self._cdf = cumulated(self.edges, self.values)
        self._tables = Tables(self.edges, self.values, self._cdf)

    def __call__(self, quantile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(t, 1/q(t)) with t = Q^-1(quantile), float64, on the device of `quantile`."""
        edges, values, cdf = self._tables.on(quantile.device)
        t, q = invert(edges, values, cdf, quantile)
        return t, 1.0 / q

    def density(self, t: torch.Tensor) -> torch.Tensor:
        """q(t), float64, of the shape and on the device of `t`."""
        edges, values, _ = self._tables.on(t.device)
        return interpolate(edges, values, t)

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """1/q(t)."""
        return 1.0 / self.density(t)

    def cdf(self, t: torch.Tensor) -> torch.Tensor:
        """Q(t)."""
        edges, values, cdf = self._tables.on(t.device)
        return integrate(edges, values, cdf, t)

    def objective_mass(self, t: torch.Tensor) -> torch.Tensor:
        """The integral of 1."""
        return t

    @property
    def breaks(self) -> list[float]:
        """The distribution function at the edges."""
        return [0.0, *self._cdf[1:-1].tolist(), 1.0]

    def digest(self) -> str:
        """SHA-256 of the table (edges, then values, as little-endian float64), in hex."""
        table = np.concatenate([self.edges, self.values]).astype("<f8")
        return hashlib.sha256(table.tobytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PiecewiseSampler):
            return NotImplemented
        return np.array_equal(self.edges, other.edges) and np.array_equal(self.values, other.values)

    def __hash__(self) -> int:
        return hash(self.digest())

    def __reduce__(self) -> tuple[type["PiecewiseSampler"], tuple[Floats, Floats]]:
        return PiecewiseSampler, (self.edges, self.values)


def mixture(
    edges: npt.ArrayLike, density: npt.ArrayLike, uniform_share: float = 0.1
) -> PiecewiseSampler:
    """The defensive mixture (1 - u) q_fit + u, u = `uniform_share`, whose weights are at most 1/u.

    Hesterberg (1995), Technometrics 37(2): the uniform share limits the damage of a bad fit.

    Args:
        edges: 0 = e_0 < ... < e_K = 1, [K + 1].
        density: q_fit at the edges, not normalised, linear between them, not negative [K + 1].
        uniform_share: share of the uniform density, in (0, 1].

    Raises:
        UserError: `uniform_share` is out of range.
        ValueError: `density` cannot be normalised to a density.
    """
    if not 0.0 < uniform_share <= 1.0:
        raise UserError(
            f"the uniform share of a rate density must lie in (0, 1], got {uniform_share}"
        )
    edges = np.asarray(edges, dtype=np.float64)
    density = np.asarray(density, dtype=np.float64)
    total = _masses(edges, density).sum()
    if not (total > 0.0 and np.isfinite(total) and (density >= 0.0).all()):
        raise ValueError("the values of a density must be finite and not negative, and not all 0")
    return PiecewiseSampler(edges, (1.0 - uniform_share) * (density / total) + uniform_share)


def _cell(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Index of the cell of a sorted table that contains x; the ends belong to the outer cells."""
    return (torch.searchsorted(table, x, right=True) - 1).clamp(0, len(table) - 2)


def cumulated(edges: Floats, values: Floats) -> Floats:
    """Integral of a density from 0 to each edge [K + 1], from its values at the edges."""
    return np.concatenate([[0.0], np.cumsum(_masses(edges, values))])


def _masses(edges: Floats, values: Floats) -> Floats:
    """Integral of the density over each cell [K]."""
    return np.diff(edges) * (values[:-1] + values[1:]) / 2


def _check(edges: Floats, values: Floats) -> None:
    if edges.ndim != 1 or edges.shape != values.shape or len(edges) < 2:
        raise ValueError("it needs two or more edges and one value for each")
    if not (np.isfinite(edges).all() and np.isfinite(values).all()):
        raise ValueError("it holds a number that is not finite")
    if edges[0] != 0.0 or edges[-1] != 1.0 or not (np.diff(edges) > 0.0).all():
        raise ValueError("its edges do not increase from 0 to 1")
    if not (values > 0.0).all():
        raise ValueError("it is not positive everywhere, so some rates would never be trained")
    integral = float(_masses(edges, values).sum())
    if abs(integral - 1.0) > INTEGRAL_TOLERANCE:
        raise ValueError(f"its integral is {integral:.6g}, not 1")
