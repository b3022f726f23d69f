"""Quantiles of the masking rate t: independent draws, StraTS (arXiv 2511.18159) and a lattice."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_mdm.objective.randomness import (
    GRID_BITS,
    MASK64,
    Purpose,
    Split,
    random_bits,
    to_grid,
)

# 2^64 / golden ratio, rounded to an odd integer. Among Kronecker sequences, i * PHI64 mod 2^64 has
# the best low-discrepancy constant. An odd step visits every 64-bit integer in one cycle.
PHI64 = 0x9E3779B97F4A7C15

# The fractional part of sqrt(2) on the 52-bit grid. It is linearly independent of the golden ratio,
# so that both together stratify rows x documents.
SQRT2 = 0x6A09E667F3BCC


@dataclass(frozen=True)
class Quantiles:
    """The quantile of each row's masking rate; every quantile is exactly uniform over (0, 1).

    Attributes:
        kind: `iid`: independent quantiles. `lattice`: (offset + row * golden ratio) mod 1 in exact
            64-bit arithmetic, so that every contiguous window of rows is close to perfectly
            stratified, whatever the global batch size. `strata`: in each window of `window` rows
            the rows fall into `strata` equal strata in random order, uniform inside each (StraTS).
        seed: seed of the run.
        split: part of the data.
        window: rows in a window, for `strata`.
        strata: strata in a window, at most `window`.
    """

    kind: Literal["iid", "strata", "lattice"]
    seed: int
    split: Split
    window: int = 1
    strata: int = 1

    def __call__(self, row: int) -> int:
        """The quantile of `row` as a grid integer (see `to_unit`)."""
        if self.kind == "iid":
            return int(to_grid(self._bits(Purpose.QUANTILE, row, 1))[0])
        if self.kind == "lattice":
            offset = _offset(self.seed, self.split)
            return ((offset + row * PHI64) & MASK64) >> (64 - GRID_BITS)
        window, place = divmod(row, self.window)
        return int(stratified_window(self, window)[place])

    def of_documents(self, row: int, count: int) -> npt.NDArray[np.int64]:
        """Quantiles of the documents of `row`, each exactly uniform, as grid integers [count].

        The first document has the quantile of the row. With `iid` the quantiles are independent.
        With the other kinds each next document adds sqrt(2) mod 1. The documents of one row are
        then stratified, and so are the d-th documents of all rows.
        """
        if self.kind == "iid":
            return to_grid(self._bits(Purpose.QUANTILE, row, count))
        return of_parts(self(row), count)

    def _bits(self, purpose: Purpose, index: int, count: int) -> npt.NDArray[np.uint64]:
        return random_bits(self.seed, self.split, purpose, index, count)


def of_parts(first: int, count: int) -> npt.NDArray[np.int64]:
    """Quantiles of the parts of a row: `first` and each next one by sqrt(2) mod 1 further.

    Args:
        first: quantile of the first part, a grid integer.
        count: number of parts.

    Returns:
        Grid integers [count].
    """
    steps = np.arange(count, dtype=np.uint64) * np.uint64(SQRT2)  # modulo 2^64, so exact
    last = np.uint64(2**GRID_BITS - 1)
    return ((np.uint64(first) + steps) & last).astype(np.int64)


@lru_cache(maxsize=16)
def _offset(seed: int, split: Split) -> int:
    return int(random_bits(seed, split, Purpose.OFFSET, 0, 1)[0])


@lru_cache(maxsize=16)
def stratified_window(quantiles: Quantiles, window: int) -> npt.NDArray[np.int64]:
    """Quantiles of all rows of one window (StraTS, arXiv 2511.18159), as grid integers [window].

    The rows are shuffled and placed at equal distances on a circle, which is turned by a random
    angle and divided into equal strata. The numbers of rows in the strata then differ by at most
    one, and each row is exactly uniform even if the window is not a multiple of the strata.
    """
    W, K = quantiles.window, quantiles.strata
    bits = quantiles._bits(Purpose.STRATA, window, 2 * W + 1)
    order = np.argsort(bits[:W], kind="stable")
    turn = int(to_grid(bits[2 * W :])[0]) / 2**GRID_BITS
    stratum = np.floor(((order + turn * W) % W) * K / W).astype(np.int64).clip(0, K - 1)
    inside = to_grid(bits[W : 2 * W])
    # (stratum + inside) / K in integers. stratum * 2^52 may exceed int64; Python integers cannot
    # overflow.
    grid = [(int(s) * 2**GRID_BITS + int(v)) // K for s, v in zip(stratum, inside, strict=True)]
    return np.array(grid, dtype=np.int64)
