"""Decomposes the variance of the loss and of the gradient into its three parts (A, B, C).

Let l be the loss of a row, or its gradient; for the gradient, Var is the trace of the covariance.
With t uniform (arXiv 2511.18159, eq. 2),

    Var[l] =  E_{x,t} Var_m[l | x,t]           A  masking pattern
            + E_x Var_t(E_m[l | x,t])          B  masking rate
            + Var_x(E_{t,m}[l | x])            C  data

These are differences of four mean squares,

    S1 = E |l|^2,   S2 = E_{x,t} |E_m l|^2,   S3 = E_x |E_{t,m} l|^2,   S4 = |E l|^2,
    A = S1 - S2,    B = S2 - S3,              C = S3 - S4.

They are estimated from nested draws, n0 rows x nt rates x nm masks. The rates are not uniform. l
has the weight 1/p(t), so E[l^2 | t] grows like 1/p and E[l^4 | t] like 1/p^3. With uniform rates
the few draws near t = 0 would dominate, and error bars from a sample without such draws would be
far too short. The rates are drawn from a density q, a mixture of the uniform density and 1/p(t)
(`nested_sampler`), and have the weight w = 1/q. Let l_ijk be the loss with mask k at rate j of row
i, and c_ij its mean over the masks. Then

    S1 = mean of w_ij |l_ijk|^2
    S2 = mean of w_ij <l_ijk, l_ijk'>             over pairs of masks,   k != k'
    S3 = mean of w_ij w_ij' <c_ij, c_ij'>         over pairs of rates,   j != j'
    S4 = mean of w_ij w_i'j' <c_ij, c_i'j'>       over pairs of rows,    i != i'

are unbiased (U-statistics), because the factors of each product are independent. Estimates of B and
C can be negative if the true values are small. Subtraction of a constant from all draws does not
change A, B or C. But in S2 to S4 the noise of w multiplies the values, so the weighted mean of all
cells is subtracted first. A larger uniform share improves the estimate of C and degrades that of A.

Standard errors come from a bootstrap over rows. With a hundred rows they are about 10% too small,
because the distribution of a variance has a long tail. With some hundreds of rows they are right.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatron_mdm.objective.ppots.fit import tabulate
from megatron_mdm.objective.samplers import PiecewiseSampler, mixture
from megatron_mdm.objective.types import Floats

Estimate = tuple[float, float]  # value, standard error
UNIFORM_SHARE = 0.4


def nested_sampler(eps: float, share: float = UNIFORM_SHARE) -> PiecewiseSampler:
    """The density of the nested rates: a mixture of the uniform density and 1/p(t).

    Args:
        eps: p(t) = (1 - eps) t + eps.
        share: share of the uniform density, in (0, 1].
    """
    return mixture(*tabulate(lambda t: 1.0 / ((1.0 - eps) * t + eps)), share)


@dataclass(frozen=True)
class NestedDraws:
    """Nested draws, reduced over masks: the data for A, B, C and the variances of methods.

    Attributes:
        t: rates [n0, nt].
        weight: w = 1/q, q being the density that the rates were drawn from [n0, nt].
        gram: inner products <c_ij, c_i'j'> of the means over masks [n0 nt, n0 nt].
        square: mean of |l_ijk|^2 over masks [n0, nt].
        masks: number of masks at each rate, nm.
    """

    t: Floats
    weight: Floats
    gram: Floats
    square: Floats
    masks: int

    @classmethod
    def of_means(
        cls, t: Floats, weight: Floats, means: npt.ArrayLike, square: Floats, masks: int
    ) -> "NestedDraws":
        """Makes nested draws from the means over masks [n0, nt, d]; for the rest see the class."""
        flat = np.asarray(means).reshape(t.size, -1).astype(np.float64)
        return cls(t, weight, flat @ flat.T, square, masks)

    @classmethod
    def of_draws(cls, t: Floats, weight: Floats, draws: Floats) -> "NestedDraws":
        """Makes nested draws from single draws [n0, nt, nm, d]."""
        square = (draws**2).sum(axis=3).mean(axis=2)
        return cls.of_means(t, weight, draws.mean(axis=2), square, draws.shape[2])

    def centred(self) -> "NestedDraws":
        """The draws minus the weighted mean of all cells c_ij."""
        share = self.weight.ravel() / self.weight.sum()
        along = self.gram @ share
        norm = float(share @ along)
        gram = self.gram - along[:, None] - along + norm
        square = self.square - 2 * along.reshape(self.t.shape) + norm
        return NestedDraws(self.t, self.weight, gram, square, self.masks)

    @cached_property
    def pattern(self) -> Floats:
        """Unbiased estimate of Var_m at each rate [n0, nt]."""
        norms = self.gram.diagonal().reshape(self.t.shape)
        variance: Floats = (self.square - norms) * self.masks / (self.masks - 1)
        return variance

    @cached_property
    def rate(self) -> Floats:
        """Unbiased estimate of |E_m l - E_{t,m} l|^2 at each of three or more rates [n0, nt].

        E_{t,m} l is estimated from the other rates of the row, so that the factors of each product
        are independent draws.
        """
        nt = self.t.shape[1]
        products, w = self._within, self.weight
        own = products.diagonal(axis1=1, axis2=2) - self.pattern / self.masks
        weighted = products * w[:, None, :]
        with_others = weighted.sum(axis=2) - weighted.diagonal(axis1=1, axis2=2)
        # Sum over pairs of rates, minus the pairs that contain this rate.
        pairs = (w * with_others).sum(axis=1, keepdims=True)
        among_others = pairs - 2 * w * with_others
        result: Floats = own - 2 * with_others / (nt - 1) + among_others / ((nt - 1) * (nt - 2))
        return result

    @cached_property
    def _within(self) -> Floats:
        """Inner products of the cells of one row, for each row [n0, nt, nt]."""
        n0, nt = self.t.shape
        rows = np.arange(n0)
        products: Floats = self.gram.reshape(n0, nt, n0, nt)[rows, :, rows]
        return products

    def mean_squares(self, counts: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """S1 to S4 [R] of R samples of rows; `counts` [n0, R] is how often each contains a row."""
        n0, nt = self.t.shape
        w = self.weight
        norms = self._within.diagonal(axis1=1, axis2=2)
        S1 = (w * self.square).mean(axis=1)
        S2 = (w * (norms - self.pattern / self.masks)).mean(axis=1)
        weighted = self._within * w[:, :, None] * w[:, None, :]
        S3 = (weighted.sum(axis=(1, 2)) - (w**2 * norms).sum(axis=1)) / (nt * (nt - 1))
        flat = w.ravel()
        rows = (self.gram * flat[:, None] * flat).reshape(n0, nt, n0, nt).mean(axis=(1, 3))
        return (
            S1 @ counts / n0,
            S2 @ counts / n0,
            S3 @ counts / n0,
            mean_over_row_pairs(rows, counts),
        )


def mean_over_row_pairs(products: Floats, counts: Floats) -> Floats:
    """Mean of inner products [n0, n0] over pairs of different rows, for R samples of rows.

    A bootstrap sample contains copies of a row, and pairs of a row with its copy must not count.
    They are corrected for together: if W is the variance between the drawn rows, the mean over
    pairs is |mean|^2 - W / n0.

    Args:
        products: inner products of rows [n0, n0].
        counts: how often each sample contains each row [n0, R].

    Returns:
        The mean for each sample [R].
    """
    n0 = len(products)
    square = (counts * (products @ counts)).sum(axis=0) / n0**2
    W = (products.diagonal() @ counts / n0 - square) * n0 / (n0 - 1)
    pairs: Floats = square - W / n0
    return pairs


def resampled(n0: int, repetitions: int, seed: int) -> Floats:
    """Bootstrap: how often each sample contains each of n0 rows [n0, 1 + repetitions].

    The first column is 1 (the original rows); the others are bootstrap samples.
    """
    drawn = np.random.default_rng(seed).multinomial(n0, np.full(n0, 1 / n0), size=repetitions)
    return np.concatenate([np.ones((n0, 1)), drawn.T], axis=1)


def with_error(values: Floats, n0: int) -> Estimate:
    """The first of values [1 + repetitions], with the others' standard deviation as its error.

    The standard deviation is corrected by sqrt(n0 / (n0 - 1)), n0 being the number of rows.
    """
    error = values[1:].std(ddof=1) * math.sqrt(n0 / (n0 - 1))
    return float(values[0]), float(error)


@dataclass(frozen=True)
class Decomposition:
    """A, B, C and their sum, each (estimate, standard error)."""

    A: Estimate
    B: Estimate
    C: Estimate
    total: Estimate


def decompose(nested_draws: NestedDraws, repetitions: int = 1000, seed: int = 0) -> Decomposition:
    """A, B and C (arXiv 2511.18159, eq. 2), with bootstrap standard errors over rows.

    Args:
        nested_draws: draws of n0 >= 2 rows, nt >= 3 independent rates and nm >= 2 masks.
        repetitions: number of bootstrap samples.
        seed: seed of the bootstrap.
    """
    n0, nt = nested_draws.t.shape
    if n0 < 2 or nt < 3 or nested_draws.masks < 2:
        raise ValueError(
            f"needs at least 2 rows, 3 rates and 2 masks, got {n0}, {nt} and {nested_draws.masks}"
        )
    S1, S2, S3, S4 = nested_draws.centred().mean_squares(resampled(n0, repetitions, seed))
    parts = (S1 - S2, S2 - S3, S3 - S4, S1 - S4)
    return Decomposition(*(with_error(part, n0) for part in parts))


def between_row_variance(
    vectors: npt.NDArray[np.float32], repetitions: int = 1000, seed: int = 0
) -> Estimate:
    """Variance between rows [n0, d] without noise of rates or masks: C if A and B are 0."""
    n0 = len(vectors)
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    products = centred @ centred.T
    counts = resampled(n0, repetitions, seed)
    return with_error(products.diagonal() @ counts / n0 - mean_over_row_pairs(products, counts), n0)


def curve(
    t: Floats, values: Floats, weight: Floats, num_bins: int
) -> list[tuple[float, float] | None]:
    """Means over equal bins of t, with standard errors over rows.

    Args:
        t: rates [n0, nt].
        values: values at these rates [n0, nt].
        weight: one over the density that the rates were drawn from [n0, nt].
        num_bins: number of bins.

    Returns:
        (mean, standard error) of each bin; None if fewer than two rows have rates in the bin.
    """
    index = np.ceil(t * num_bins) - 1
    points: list[tuple[float, float] | None] = []
    for i in range(num_bins):
        inside = np.where(index == i, weight, 0.0)
        n = int((inside > 0).any(axis=1).sum())
        if n < 2:
            points.append(None)
            continue
        mean = float((inside * values).sum() / inside.sum())
        residual = (inside * (values - mean)).sum(axis=1)
        points.append((mean, math.sqrt((residual**2).sum() * n / (n - 1)) / inside.sum()))
    return points
