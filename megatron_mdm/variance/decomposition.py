"""Where the variance of the loss and of the gradient comes from.

With l the loss of a row (or, for the gradient, the trace of the covariance in the place of Var),

    Var[l] =  E_{x,t} Var_m[l | x,t]           A  masking pattern
            + E_x Var_t(E_m[l | x,t])          B  masking rate
            + Var_x(E_{t,m}[l | x])            C  data

(arXiv 2511.18159, eq. 2), t uniform. These are differences of four mean squares,

    S1 = E |l|^2,   S2 = E_{x,t} |E_m l|^2,   S3 = E_x |E_{t,m} l|^2,   S4 = |E l|^2,
    A = S1 - S2,    B = S2 - S3,              C = S3 - S4.

Nested draws, n0 rows x nt rates x nm masks, estimate them. The rates do not come from the uniform:
l has the weight 1/p(t), E[l^2 | t] rises like 1/p and E[l^4 | t] like 1/p^3, so that under uniform
rates the few draws near t = 0 would decide, and error bars that have not seen these would be far
too short. They come from a density q, a mixture of the uniform and 1/p(t) (`nested_sampler`), and
count with w = 1/q. With l_ijk mask k at rate j of row i and c_ij the mean over its masks,

    S1 = mean of w_ij |l_ijk|^2
    S2 = mean of w_ij <l_ijk, l_ijk'>             over pairs of masks,   k != k'
    S3 = mean of w_ij w_ij' <c_ij, c_ij'>         over pairs of rates,   j != j'
    S4 = mean of w_ij w_i'j' <c_ij, c_i'j'>       over pairs of rows,    i != i'

are unbiased (U-statistics), since what is multiplied is independent. Estimates of B and C can come
out negative where the truth is small. A constant taken off all draws changes none of A, B and C,
but in S2 to S4 the noise of w multiplies what is left: the weighted mean of all cells is taken off.
Of the uniform share more makes C better known, and A worse.

Standard errors come from a bootstrap over rows. At a hundred rows they are about 10% short, since
the distribution of a variance has a long tail; from some hundreds of rows on they are right.
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
    """The density of nested rates: `share` uniform, the rest proportional to 1/p(t).

    Args:
        eps: p(t) = (1 - eps) t + eps.
        share: in (0, 1].
    """
    return mixture(*tabulate(lambda t: 1.0 / ((1.0 - eps) * t + eps)), share)


@dataclass(frozen=True)
class NestedDraws:
    """Nested draws, their masks summed up: what A, B, C and the methods' variances are made of.

    Attributes:
        t: rates [n0, nt].
        weight: w, one over the density that they were drawn from [n0, nt].
        gram: products <c_ij, c_i'j'> of the means over masks [n0 nt, n0 nt].
        square: mean of the masks' squared norms [n0, nt].
        masks: nm.
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
        """From the means over masks [n0, nt, d]."""
        flat = np.asarray(means).reshape(t.size, -1).astype(np.float64)
        return cls(t, weight, flat @ flat.T, square, masks)

    @classmethod
    def of_draws(cls, t: Floats, weight: Floats, draws: Floats) -> "NestedDraws":
        """From the draws themselves [n0, nt, nm, d]."""
        square = (draws**2).sum(axis=3).mean(axis=2)
        return cls.of_means(t, weight, draws.mean(axis=2), square, draws.shape[2])

    def centred(self) -> "NestedDraws":
        """The draws less the weighted mean of all cells."""
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

        The second mean is that over the other rates, so that products are of different draws.
        """
        nt = self.t.shape[1]
        products, w = self._within, self.weight
        own = products.diagonal(axis1=1, axis2=2) - self.pattern / self.masks
        weighted = products * w[:, None, :]
        with_others = weighted.sum(axis=2) - weighted.diagonal(axis1=1, axis2=2)
        # Pairs of rates, less those that this rate is one of.
        pairs = (w * with_others).sum(axis=1, keepdims=True)
        among_others = pairs - 2 * w * with_others
        result: Floats = own - 2 * with_others / (nt - 1) + among_others / ((nt - 1) * (nt - 2))
        return result

    @cached_property
    def _within(self) -> Floats:
        """Products of the cells of each row [n0, nt, nt]."""
        n0, nt = self.t.shape
        rows = np.arange(n0)
        products: Floats = self.gram.reshape(n0, nt, n0, nt)[rows, :, rows]
        return products

    def mean_squares(self, counts: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """S1 to S4 [R], rows standing in as often as `counts` [n0, R] says."""
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
    """Mean of products [n0, n0] over pairs of rows, each standing in as often as counts [n0, R].

    The pairs of a row with its own copies, which a bootstrap draws, are corrected for as a whole:
    with W the variance between the rows drawn, the mean over pairs is |mean|^2 - W / n0.
    """
    n0 = len(products)
    square = (counts * (products @ counts)).sum(axis=0) / n0**2
    W = (products.diagonal() @ counts / n0 - square) * n0 / (n0 - 1)
    pairs: Floats = square - W / n0
    return pairs


def resampled(n0: int, repetitions: int, seed: int) -> Floats:
    """Counts of n0 rows [n0, 1 + repetitions]: each once, then those of bootstrap samples."""
    drawn = np.random.default_rng(seed).multinomial(n0, np.full(n0, 1 / n0), size=repetitions)
    return np.concatenate([np.ones((n0, 1)), drawn.T], axis=1)


def with_error(values: Floats, n0: int) -> Estimate:
    """The first of values [1 + repetitions], and the spread of the others as its error."""
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
        nested_draws: of n0 >= 2 rows, nt >= 3 independent rates and nm >= 2 masks.
        repetitions: of the bootstrap.
        seed: of the bootstrap.
    """
    n0, nt = nested_draws.t.shape
    if n0 < 2 or nt < 3 or nested_draws.masks < 2:
        raise ValueError(
            f"it takes 2 rows, 3 rates and 2 masks at least, got {n0}, {nt} and "
            f"{nested_draws.masks}"
        )
    S1, S2, S3, S4 = nested_draws.centred().mean_squares(resampled(n0, repetitions, seed))
    parts = (S1 - S2, S2 - S3, S3 - S4, S1 - S4)
    return Decomposition(*(with_error(part, n0) for part in parts))


def between_row_variance(
    vectors: npt.NDArray[np.float32], repetitions: int = 1000, seed: int = 0
) -> Estimate:
    """Variance between rows [n0, d] that nothing else disturbs: C where there is no A and no B."""
    n0 = len(vectors)
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    products = centred @ centred.T
    counts = resampled(n0, repetitions, seed)
    return with_error(products.diagonal() @ counts / n0 - mean_over_row_pairs(products, counts), n0)


def curve(
    t: Floats, values: Floats, weight: Floats, num_bins: int
) -> list[tuple[float, float] | None]:
    """Means over equal bins of t, with standard errors over rows; None: rates of fewer than 2.

    Args:
        t: rates [n0, nt].
        values: at these rates [n0, nt].
        weight: one over the density that the rates were drawn from [n0, nt].
        num_bins: number of bins.
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
