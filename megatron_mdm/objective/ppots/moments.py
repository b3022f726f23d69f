"""P-POTS (arXiv 2511.18159): second moments g^2 + v of a value, per masking rate.

The variance of value / q(t) is least for q*(t) proportional to sqrt(E[value^2 | t]). The value of a
row at rate t is its loss l (nats per eligible token; target `loss`, as in the paper) or the norm of
dl/dh (target `gradient`). The value does NOT include the importance weight 1/q(t) of the sampler.

The second moment is the raw one: E[value^2 | t] = g^2 + v, where v is the variance over rows AND
masks. It includes the variance of the conditional mean between rows, which the authors' released
code omits.

The bins are n equal bins of t; bin i is (i/n, (i+1)/n].
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatron_mdm.errors import UserError
from megatron_mdm.objective.ppots.exact_sums import BOUND, LIMBS, from_limbs, to_limbs
from megatron_mdm.objective.ppots.limits import MOST_PPOTS_BINS
from megatron_mdm.objective.types import Floats


def accumulate(
    t: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    num_bins: int,
    present: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes the sums of `RateMoments.vector()` over B rows, without waiting for the device.

    A row is skipped, and counted as skipped, if w, w value or w value^2 is not finite or not below
    2^50 in magnitude, w being its weight. Bits of a term below 2^-70 are cut off.

    Args:
        t: masking rates in (0, 1], [B].
        value: value of each row, not weighted by 1/q(t) [B].
        weight: w = 1/q(t), the importance weight of the rate alone [B].
        num_bins: number of equal bins of t.
        present: which entries are real rows, bool [B]; None: all.

    Returns:
        Exact sums, int64 [LIMBS, 4 num_bins + 1] (`exact_sums`), which can be added over
        micro-batches and ranks in any order.
    """
    t, value, weight = (x.detach().reshape(-1).to(torch.float64) for x in (t, value, weight))
    product = weight * value
    there = torch.ones_like(t, dtype=torch.bool) if present is None else present.reshape(-1)
    sums = torch.stack([weight, product, product * value, torch.ones_like(t)])
    # A comparison with NaN is False.
    good = (sums.abs() < BOUND).all(dim=0) & (weight > 0.0) & (t > 0.0) & (t <= 1.0) & there
    limbs = to_limbs(torch.where(good, sums, 0.0)).flatten(0, 1)
    index = torch.ceil(torch.where(good, t, 1.0) * num_bins).to(torch.int64) - 1
    per_bin = limbs.new_zeros(len(limbs), num_bins)
    per_bin.index_add_(1, index.clamp(min=0), limbs)
    skipped = to_limbs((there & ~good).sum().to(torch.float64))
    return torch.cat([per_bin.reshape(LIMBS, -1), skipped[:, None]], dim=1)


class RateMoments:
    """Running first and second moments of a value per bin of t.

    The rates of rows are drawn from a density q, so each row has the weight w = 1/q(t):

        second moment of bin i = (sum_i w value^2) / (sum_i w).

    This is the self-normalised estimate of the mean of E[value^2 | t] over the bin for UNIFORM t.
    """

    def __init__(self, num_bins: int):
        if not 1 <= num_bins <= MOST_PPOTS_BINS:
            raise UserError(f"the number of rate bins must lie in 1..{MOST_PPOTS_BINS}: {num_bins}")
        self._vector = np.zeros(4 * num_bins + 1)

    @property
    def num_bins(self) -> int:
        """Number of bins of t."""
        return len(self._vector) // 4

    @property
    def counts(self) -> Floats:
        """Number of rows in each bin [n]; not an integer after a decay."""
        counts: Floats = self._sums[3].copy()
        return counts

    @property
    def rows(self) -> float:
        """Number of rows in all bins; not an integer after a decay."""
        return float(self._sums[3].sum())

    @property
    def skipped(self) -> int:
        """Number of rows that `accumulate` skipped; never decays."""
        return int(self._vector[-1])

    def update(self, t: npt.ArrayLike, value: npt.ArrayLike, weight: npt.ArrayLike) -> None:
        """Adds rows; for the arguments see `accumulate`."""
        t, value, weight = (torch.as_tensor(x, dtype=torch.float64) for x in (t, value, weight))
        self.add(from_limbs(accumulate(t, value, weight, self.num_bins)))

    def add(self, other: "RateMoments | npt.ArrayLike") -> None:
        """Adds other moments, or a vector in the layout of `vector`."""
        vector = other if isinstance(other, RateMoments) else RateMoments.from_vector(other)
        if vector.num_bins != self.num_bins:
            raise ValueError(f"{vector.num_bins} bins cannot be added to {self.num_bins}")
        self._vector += vector._vector

    def decay(self, factor: float) -> None:
        """Multiplies all sums but `skipped` by `factor` in [0, 1], so that old rows count less."""
        if not 0.0 <= factor <= 1.0:
            raise UserError(f"the decay of rate moments must lie in [0, 1], got {factor}")
        self._vector[:-1] *= factor

    def vector(self) -> Floats:
        """Sums of w, w value, w value^2 and 1 over the rows of each bin, then `skipped` [4n + 1].

        The n sums of w come first, then the n sums of w value, and so on.
        """
        return self._vector.copy()

    @classmethod
    def from_vector(cls, vector: npt.ArrayLike) -> "RateMoments":
        """The inverse of `vector`.

        Raises:
            ValueError: the vector has a wrong length, or a sum that no rows can have.
        """
        array = np.array(vector, dtype=np.float64)
        if array.ndim != 1 or len(array) % 4 != 1:
            raise ValueError("rate moments are 4 numbers for each bin, and 1 more")
        moments = cls(len(array) // 4)
        moments._vector = array
        if not np.isfinite(array).all() or (moments._sums[[0, 2, 3]] < 0.0).any() or array[-1] < 0:
            raise ValueError("rate moments hold a number that is negative or not finite")
        return moments

    def check(self, most_rows: float) -> None:
        """Checks that at most `most_rows` rows can have these sums.

        Raises:
            ValueError: they cannot.
        """
        rows = self.rows + self.skipped
        if rows > most_rows:
            raise ValueError(f"it counts {rows:.4g} rows, but at most {most_rows:.0f} are possible")
        if (np.abs(self._sums[:3]) > self._sums[3] * BOUND).any():
            raise ValueError("it holds sums that are too large for their rows")

    def mean(self) -> Floats:
        """Mean value in each bin for uniform t [n]; NaN in bins without rows."""
        return self._over_weights(1)

    def second_moment(self) -> Floats:
        """Mean squared value in each bin for uniform t [n]; NaN in bins without rows."""
        return self._over_weights(2)

    @property
    def _sums(self) -> Floats:
        sums: Floats = self._vector[:-1].reshape(4, -1)
        return sums

    def _over_weights(self, power: int) -> Floats:
        weights = self._sums[0]
        result: Floats = np.full(self.num_bins, np.nan)
        np.divide(self._sums[power], weights, out=result, where=weights > 0.0)
        return result

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RateMoments):
            return NotImplemented
        return np.array_equal(self._vector, other._vector)

    __hash__ = None  # type: ignore[assignment]  # mutable


@dataclass(frozen=True)
class TextMoments:
    """Separate moments of independent texts, which give the standard error of their sum.

    Attributes:
        texts: the moments of each text, all with the same number of bins.
    """

    texts: tuple[RateMoments, ...]

    @property
    def total(self) -> RateMoments:
        """Moments of all texts."""
        total = RateMoments(self.texts[0].num_bins)
        for text in self.texts:
            total.add(text)
        return total

    def errors(self) -> Floats:
        """Standard error of `total.second_moment()`, by the jackknife over texts [n].

        NaN in a bin where fewer than two texts have draws.
        """
        sums = np.array([text._sums[[0, 2]] for text in self.texts])  # [texts, 2, n]
        has = sums[:, 0] > 0.0
        number = has.sum(axis=0)
        result: Floats = np.full(sums.shape[2], np.nan)
        some = number > 1
        weights, squares = (sums.sum(axis=0) - sums).transpose(1, 0, 2)[:, :, some]
        without = np.where(has[:, some], squares / weights, 0.0)
        m = number[some]
        spread = np.where(has[:, some], without - without.sum(axis=0) / m, 0.0)
        result[some] = np.sqrt((m - 1) / m * (spread**2).sum(axis=0))
        return result
