"""Uniforms and quantiles of a row: pure functions of (seed, stream, row number).

Rows are numbered by their position in the run, so what is drawn here is the same under every
parallel layout and after a resume, and nothing has to be communicated or saved.

Numbers are kept as integers k in [0, 2^52), int64, and stand for (k + 1/2) 2^-52. Every such number
is exact in float64, lies strictly inside (0, 1), and its mirror image 1 - u is again one of them.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

GRID_BITS = 52
_MASK64 = 2**64 - 1
# 2^64 / golden ratio, rounded to odd: the Kronecker sequence i * PHI64 mod 2^64 has the best
# low-discrepancy constant of all, and odd makes it a full cycle over the 64-bit integers.
PHI64 = 0x9E3779B97F4A7C15
# The fraction of sqrt(2) on the 52-bit grid: together with the golden ratio, of which it is
# independent, it stratifies rows x documents.
SQRT2 = 0x6A09E667F3BCC


class Purpose(IntEnum):
    """What a stream of random numbers is for."""

    MASK = 0
    QUANTILE = 1
    STRATA = 2
    OFFSET = 3
    SYRM = 4
    LENGTH = 5
    EPOCH = 6


class Split(IntEnum):
    """The part of the data: each has its own streams, so validation never repeats training's."""

    TRAIN = 0
    VALID = 1
    TEST = 2


def random_bits(
    seed: int, split: Split, purpose: Purpose, index: int, count: int
) -> npt.NDArray[np.uint64]:
    """The first `count` 64-bit words of stream (seed, split, purpose) at `index`.

    Philox4x64 (Salmon et al., 2011) keyed by the stream, with `index` in the second word of its
    counter: 2^64 indices of 2^66 words each that never overlap. Raw words are used because NumPy
    keeps these stable across versions, and its distribution methods not.

    Args:
        seed: any integer, taken modulo 2^64.
        split: part of the data.
        purpose: what the words are for.
        index: row (or pair, or window) number, not negative.
        count: number of words.

    Returns:
        uint64 [count].
    """
    key = np.array([seed & _MASK64, 16 * split + purpose], dtype=np.uint64)
    counter = np.array([0, index, 0, 0], dtype=np.uint64)
    words: npt.NDArray[np.uint64] = np.random.Philox(key=key, counter=counter).random_raw(count)
    return words


def to_grid(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """The 52 leading bits of each word: integers that `to_unit` maps to (0, 1)."""
    return (words >> np.uint64(64 - GRID_BITS)).view(np.int64)


def to_unit(grid: torch.Tensor) -> torch.Tensor:
    """(k + 1/2) 2^-52 in float64, strictly inside (0, 1), exact."""
    return (grid.to(torch.float64) + 0.5) * 2.0**-GRID_BITS


def row_uniforms(seed: int, split: Split, row: int, length: int) -> npt.NDArray[np.int64]:
    """One uniform per position of a row, as grid integers [length]."""
    return to_grid(random_bits(seed, split, Purpose.MASK, row, length))


def row_length(seed: int, split: Split, row: int, longest: int, fraction: float) -> int:
    """Length of a row of which a fraction end early, at 1 to `longest`, each equally likely.

    Args:
        seed: seed of the run.
        split: part of the data.
        row: its number.
        longest: of the others.
        fraction: in [0, 1].
    """
    whether, where = to_grid(random_bits(seed, split, Purpose.LENGTH, row, 2)).tolist()
    return 1 + (where * longest >> GRID_BITS) if whether < fraction * 2**GRID_BITS else longest


def view_of(grid: npt.NDArray[np.int64], view: int, views: int) -> npt.NDArray[np.int64]:
    """The uniforms of one of several views of the same row, each of them exactly uniform.

    Two views are MIRROR (arXiv 2511.18159): u and 1 - u, so that the masks of both are as
    negatively correlated as two masks can be; -min(p/(1-p), (1-p)/p) at each position. K views turn
    around the circle: view j has frac(u + j/K).

    Args:
        grid: uniforms of the row as grid integers [L].
        view: j in 0..K-1.
        views: K.

    Returns:
        Grid integers [L].
    """
    last = np.int64(2**GRID_BITS - 1)
    turn = np.int64((view << GRID_BITS) // views)
    turned: npt.NDArray[np.int64] = last - grid if (view, views) == (1, 2) else grid + turn & last
    return turned


@dataclass(frozen=True)
class Quantiles:
    """The quantile at which a row's masking rate is drawn, each exactly uniform over (0, 1).

    Attributes:
        kind: `iid`: independent. `lattice`: offset + row * golden ratio mod 1 in exact 64-bit
            arithmetic, so that every contiguous window of rows is close to perfectly stratified
            whatever the global batch size. `strata`: windows of `window` rows, in each of which
            the rows fall into `strata` equal strata, shuffled, uniform inside (StraTS).
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
            return ((offset + row * PHI64) & _MASK64) >> (64 - GRID_BITS)
        window, place = divmod(row, self.window)
        return int(_stratified_window(self, window)[place])

    def of_documents(self, row: int, count: int) -> npt.NDArray[np.int64]:
        """Quantiles of the documents of `row`, each exactly uniform, as grid integers [count].

        The first is the row's. `iid`: independent. Else they go on from it in steps of sqrt(2) mod
        1: the documents of one row are stratified, and so is every d-th document over the rows.
        """
        if self.kind == "iid":
            return to_grid(self._bits(Purpose.QUANTILE, row, count))
        steps = np.arange(count, dtype=np.uint64) * np.uint64(SQRT2)  # modulo 2^64, so exact
        last = np.uint64(2**GRID_BITS - 1)
        return ((np.uint64(self(row)) + steps) & last).astype(np.int64)

    def _bits(self, purpose: Purpose, index: int, count: int) -> npt.NDArray[np.uint64]:
        return random_bits(self.seed, self.split, purpose, index, count)


@lru_cache(maxsize=16)
def _offset(seed: int, split: Split) -> int:
    return int(random_bits(seed, split, Purpose.OFFSET, 0, 1)[0])


@lru_cache(maxsize=16)
def _stratified_window(quantiles: Quantiles, window: int) -> npt.NDArray[np.int64]:
    """Grid integers of all rows of one window.

    The rows are shuffled and laid around a circle that the strata divide equally, turned by a
    random angle: strata then hold equally many rows, give or take one, and each row is exactly
    uniform even where the number of strata does not divide the window.
    """
    W, K = quantiles.window, quantiles.strata
    bits = quantiles._bits(Purpose.STRATA, window, 2 * W + 1)
    order = np.argsort(bits[:W], kind="stable")
    turn = int(to_grid(bits[2 * W :])[0]) / 2**GRID_BITS
    stratum = np.floor(((order + turn * W) % W) * K / W).astype(np.int64).clip(0, K - 1)
    inside = to_grid(bits[W : 2 * W])
    # (stratum + inside) / K in integers: inside < 2^52 and K <= W, so this stays below 2^63 only
    # when divided first; Python integers have no such limit.
    grid = [(int(s) * 2**GRID_BITS + int(v)) // K for s, v in zip(stratum, inside, strict=True)]
    return np.array(grid, dtype=np.int64)
