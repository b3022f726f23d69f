"""Rate densities fitted to measured second moments: the optimum of P-POTS (arXiv 2511.18159).

Let m2(t) = E[value^2 | t]. The variance of value / q(t) is least for q proportional to sqrt(m2). A
family (families.py) models m2. For bin i, let M_i be the mean of m2 over the bin, S_i the measured
second moment and n_i the number of rows. The fit minimises the Kullback-Leibler divergence

    KL(P | Q),    P_i = n_i sqrt(S_i) / sum,    Q_i = n_i sqrt(M_i) / sum.

This is the divergence of the paper if all bins have the same number of rows. Bins with few rows are
noisy and have less weight. P and Q both take the root of a mean. A family that contains the true m2
therefore recovers it, however steep m2 is within a bin. With the mean of sqrt(m2) over the bin in
place of sqrt(M_i) it would not (an error of 12% in the first of 30 bins for m2 = 1/p).

The measured bins do not determine every parameter: a term that is small in all bins may have any
exponent, and a spike inside one bin any width. Rounding would then decide. With n the number of
bins, the parameters x therefore minimise

    n/2 log(rows KL + FLOOR) + sum_j ((x_j - c_j) / s_j)^2 / 2.

The first term is the negative log-likelihood for noise of unknown size. The second is a normal
prior with center c and width s. A parameter that the bins do not determine takes the center of its
prior. The prior loses influence as the divergence falls, so exact measurements of a member of a
family give that member. Bounds keep every term of g at least as wide as a bin: m <= n and
k <= 1 / (1/10 + m / 4n), so that log g rises by less than 4 over a bin. The exponents r and s of
`epr` belong to a square and are at most 2 n. With these rules, sums that differ only by rounding
give nearly equal densities.

The family `piecewise` is not in families.py: it is linear between the bin centres, where it has the
roots of the measured second moments.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import minimize

from megatron_mdm.errors import UserError
from megatron_mdm.objective.ppots.families import FAMILIES, MOST_EXPONENT, MOST_SLOPE, Family
from megatron_mdm.objective.ppots.limits import TABLE_SIZE
from megatron_mdm.objective.ppots.moments import RateMoments
from megatron_mdm.objective.randomness import GRID_BITS, to_grid
from megatron_mdm.objective.samplers import PiecewiseSampler, mixture
from megatron_mdm.objective.types import Floats

Target = Literal["loss", "gradient"]  # the value that a density is fitted to
# Quadrature nodes in one bin: exact up to rounding for m2 = p^-2 in the first bin.
ORDER = 16
# Number of starts that are refined to convergence.
KEPT_STARTS = 8
# Rows times divergence, nats, below which a better fit gains little: above rounding, below noise.
FLOOR = 0.01
# Largest relative error of a table before it is normalised.
TABLE_ERROR = 4e-4
# Options of L-BFGS-B: for the rough descent from all starts, and for the refinement of the best
# ones up to the precision of float64.
ROUGH_OPTIONS = {"ftol": 1e-5, "gtol": 1e-3, "maxiter": 500}
OPTIONS = {"ftol": 0.0, "gtol": 1e-10, "maxiter": 1000}


class FitError(UserError):
    """The moments do not determine a density. Online P-POTS then keeps its current sampler."""


@dataclass(frozen=True)
class PpotsFit:
    """A fitted density and what it was fitted to.

    Attributes:
        target: the measured value: `loss` (nats per token), or `gradient`, the norm of dl/dh.
        family: `epr`, `power` or `piecewise`.
        parameters: fitted parameters of the family by name; empty for `piecewise`.
        kl: KL(P | Q), the divergence from the measured density, nats (see the module docstring).
        kls: the divergence of every family that was tried, by name.
        uniform_share: share of the uniform density in the mixture.
        eps: least masking probability.
        moments: the measured moments.
        table: the mixture of the fitted density and the uniform density.
        errors: standard error of the second moment in each bin; None: not known.
    """

    target: Target
    family: str
    parameters: dict[str, float]
    kl: float
    kls: dict[str, float]
    uniform_share: float
    eps: float
    moments: RateMoments
    table: PiecewiseSampler
    errors: tuple[float, ...] | None = None

    @property
    def rows(self) -> float:
        """Number of measured rows; after a decay, the effective number."""
        return self.moments.rows

    def sampler(self) -> PiecewiseSampler:
        """The defensive mixture (1 - uniform_share) q + uniform_share."""
        return self.table


def fit(
    moments: RateMoments,
    *,
    family: Literal["auto", "epr", "power", "piecewise"] = "auto",
    target: Target = "loss",
    uniform_share: float = 0.1,
    eps: float = 1e-3,
    starts: int = 20,
    seed: int = 0,
    errors: Floats | None = None,
) -> PpotsFit:
    """Fits the density of P-POTS (arXiv 2511.18159) to measured second moments.

    Equal arguments give bitwise equal fits.

    Args:
        moments: the measured moments.
        family: a family, or `auto`: the family with the lowest 2 rows KL + 2 (number of free
            parameters), among the families that have at most as many parameters as there are bins.
            This is the Akaike criterion if the rows are draws from the measured density.
        target: the measured value; only recorded.
        uniform_share: share of the uniform density in the mixture, in (0, 1].
        eps: least masking probability, in (0, 1); for exact-count masks one over the row length.
        starts: number of starts of L-BFGS-B for each family; the best ones are refined.
        seed: seed of the starts.
        errors: standard errors of the second moments [n]; only recorded. If any of them is NaN
            (unknown), none is recorded.

    Raises:
        FitError: a bin has no rows, or all values are 0.
        UserError: there are fewer bins than parameters, or an argument is out of range.
    """
    S, n = moments.second_moment(), moments.num_bins
    empty = int(np.isnan(S).sum())
    if empty:
        if moments.skipped:
            raise FitError(
                f"{empty} of {n} rate bins hold no rows, and {moments.skipped} draws were left out "
                "whose values are NaN or infinite: measure a model with finite values"
            )
        raise FitError(
            f"{empty} of {n} rate bins hold no rows: measure more rows or use fewer bins"
        )
    if not S.any():
        raise FitError(f"all {moments.rows:.6g} measured values are 0: measure another model")
    if not 0.0 < eps < 1.0:
        raise UserError(f"the least masking probability must lie in (0, 1), got {eps}")
    if starts < 1:
        raise UserError(f"a fit needs at least one start, got {starts}")
    names = [family] if family != "auto" else [*FAMILIES, "piecewise"]
    if family == "auto":
        names = [name for name in names if name == "piecewise" or len(FAMILIES[name].names) <= n]
    fits = {name: _fit_family(name, moments, eps, starts, seed) for name in names}
    best = min(names, key=lambda name: 2 * moments.rows * fits[name].kl + 2 * fits[name].freedom)
    chosen = fits[best]
    edges, values = chosen.table()
    return PpotsFit(
        target=target,
        family=best,
        parameters=chosen.parameters,
        kl=chosen.kl,
        kls={name: fits[name].kl for name in names},
        uniform_share=uniform_share,
        eps=eps,
        moments=RateMoments.from_vector(moments.vector()),
        table=mixture(edges, values, uniform_share),
        errors=None if errors is None or np.isnan(errors).any() else tuple(errors.tolist()),
    )


@dataclass(frozen=True)
class _Candidate:
    kl: float
    freedom: int
    parameters: dict[str, float]
    table: Callable[[], tuple[Floats, Floats]]


def _fit_family(name: str, moments: RateMoments, eps: float, starts: int, seed: int) -> _Candidate:
    root, rows, n = np.sqrt(moments.second_moment()), moments.counts, moments.num_bins
    P = rows * root / (rows * root).sum()
    if name == "piecewise":
        edges = np.concatenate([[0.0], (np.arange(n) + 0.5) / n, [1.0]])
        values = np.concatenate([root[:1], root, root[-1:]])
        M = _interpolated_square(root)
        return _Candidate(_divergence(P, rows, M)[0], n - 1, {}, lambda: (edges, values))
    family = FAMILIES[name]
    if n < len(family.names):
        raise UserError(
            f"{n} rate bins are fewer than the {len(family.names)} parameters of the {name} "
            "density: use more bins or the piecewise density"
        )
    t, p, w = _quadrature(n, eps)
    box = _Box(family, n)

    def objective(y: Floats) -> tuple[float, Floats]:
        x, chain = box.parameters(y)
        m2, derivatives = family.moment(x, t, p)
        M = (w * m2).sum(axis=1)
        kl, Q = _divergence(P, rows, M)
        slope = w * ((Q - P) / (2 * M))[:, None]  # of kl by m2
        gradient = chain @ np.array([(slope * d).sum() for d in derivatives])
        misfit = moments.rows * kl + FLOOR
        value = n / 2 * np.log(misfit) + y @ y / 2
        return float(value), n / 2 * moments.rows / misfit * gradient + y

    def descents(points: list[Floats], options: dict[str, float]) -> list[Any]:
        """Runs L-BFGS-B from each point; returns the results, the best one first."""
        ends = [
            minimize(objective, y, jac=True, method="L-BFGS-B", bounds=box.bounds, options=options)
            for y in points
        ]
        return sorted(ends, key=lambda end: float(end.fun))

    # Only the best of the rough descents are refined: the others would take two thirds of the time.
    rough = descents(_starts(box.bounds, starts, seed), ROUGH_OPTIONS)
    best = descents([end.x for end in rough[:KEPT_STARTS]], OPTIONS)[0]
    x, _ = box.parameters(np.asarray(best.x, dtype=np.float64))
    M = (w * family.moment(x, t, p)[0]).sum(axis=1)
    factor = float((rows * root).sum() / (rows * np.sqrt(M)).sum()) ** 2
    parameters = {k: float(v) for k, v in zip(family.names, family.named(x, factor), strict=True)}

    def density(t: Floats) -> Floats:
        return np.sqrt(family.moment(x, t, (1 - eps) * t + eps)[0])

    return _Candidate(_divergence(P, rows, M)[0], len(x), parameters, lambda: tabulate(density))


class _Box:
    """Coordinates y of a family's parameters in which the prior is the standard normal.

    Args:
        family: the family.
        num_bins: n, the number of bins of t in the measurement.
    """

    def __init__(self, family: Family, num_bins: int) -> None:
        self.center, self.width = np.array(family.prior).T
        low, high = np.array(family.bounds).T
        high = np.where(high == MOST_EXPONENT, min(MOST_EXPONENT, 2 * num_bins), high)
        high[:2] = 1.0, min(MOST_EXPONENT, num_bins)
        self.low, self.high, self.num_bins = low, high, num_bins

    @property
    def bounds(self) -> tuple[tuple[float, float], ...]:
        """Bounds of y."""
        ends = ((x - self.center) / self.width for x in (self.low, self.high))
        return tuple(zip(*(end.tolist() for end in ends), strict=True))

    def parameters(self, y: Floats) -> tuple[Floats, Floats]:
        """The family's parameters x, and dx_j/dy_i as [i, j]."""
        x = (self.center + self.width * y).clip(self.low, self.high)
        most = 1.0 / (1.0 / MOST_SLOPE + x[1] / (4 * self.num_bins))
        x[0] *= most
        chain = np.diag(self.width)
        chain[0, 0] *= most
        chain[1, 0] = -self.width[1] * x[0] * most / (4 * self.num_bins)
        return x, chain


def _divergence(P: Floats, rows: Floats, M: Floats) -> tuple[float, Floats]:
    """KL(P | Q) and Q_i = n_i sqrt(M_i) / sum [n]."""
    Q = rows * np.sqrt(M)
    Q = Q / Q.sum()
    # A sum of non-negative terms. The terms P log(P / Q) have both signs and would cancel.
    off = (Q - P) / np.where(P > 0.0, P, 1.0)
    return float(np.where(P > 0.0, P * (off - np.log1p(off)), Q).sum()), Q


def _quadrature(num_bins: int, eps: float) -> tuple[Floats, Floats, Floats]:
    """Nodes t, p(t) and weights of a quadrature for the mean over each bin [n, ORDER].

    Gauss-Legendre in log p: a power of p is an exponential of log p, which is smooth down to t = 0.
    """
    nodes, weights = np.polynomial.legendre.leggauss(ORDER)
    ends = np.log((1 - eps) * np.arange(num_bins + 1) / num_bins + eps)
    half = np.diff(ends)[:, None] / 2
    p = np.exp((ends[:-1, None] + ends[1:, None]) / 2 + half * nodes)
    t = ((p - eps) / (1 - eps)).clip(0.0, 1.0)
    return t, p, half * weights * p / (1 - eps) * num_bins


def _starts(bounds: tuple[tuple[float, float], ...], count: int, seed: int) -> list[Floats]:
    """Random points in the box, from raw Philox words, which are stable across NumPy versions."""
    low, high = np.array(bounds).T
    words = np.random.Philox(key=seed & (2**64 - 1)).random_raw(count * len(low))
    unit = (to_grid(words).reshape(count, len(low)) + 0.5) * 2.0**-GRID_BITS
    # k, m and exponents start more often near their lower bounds; factors, and r of `power`, start
    # in the middle of their range.
    inner = np.where(low < 0.0, 0.3 + 0.4 * unit, unit**2)
    return list(low + (high - low) * inner)


def _interpolated_square(values: Floats) -> Floats:
    """Mean over each bin of the squared linear interpolation between bin centres [n]."""
    middle = (values[:-1] + values[1:]) / 2
    left, right = np.append(values[0], middle), np.append(middle, values[-1])
    return np.asarray((left**2 + left * values + 2 * values**2 + values * right + right**2) / 6)


def tabulate(density: Callable[[Floats], Floats]) -> tuple[Floats, Floats]:
    """Edges and values of a density; its linear interpolation has a relative error <= TABLE_ERROR.

    Cells are halved until the interpolation is accurate at three points inside each. If this takes
    more than TABLE_SIZE edges, the tolerance is doubled.

    Args:
        density: positive function on [0, 1], not normalised.
    """
    tolerance = TABLE_ERROR
    edges = np.linspace(0.0, 1.0, 33)
    while True:
        values = density(edges)
        wrong = np.zeros(len(edges) - 1, dtype=bool)
        for x in (0.25, 0.5, 0.75):
            exact = density((1 - x) * edges[:-1] + x * edges[1:])
            wrong |= np.abs((1 - x) * values[:-1] + x * values[1:] - exact) > tolerance * exact
        if not wrong.any():
            return edges, values
        finer = np.sort(np.append(edges, ((edges[:-1] + edges[1:]) / 2)[wrong]))
        if len(finer) > TABLE_SIZE:
            tolerance *= 2
        else:
            edges = finer
