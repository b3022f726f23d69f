"""Uniforms and quantiles of a row: pure functions of (seed, stream, row number).

Rows are numbered by their position in the run, so what is drawn here is the same under every
parallel layout and after a resume, and nothing has to be communicated or saved.

Numbers are kept as integers k in [0, 2^52), int64, and stand for (k + 1/2) 2^-52. Every such number
is exact in float64, lies strictly inside (0, 1), and its mirror image 1 - u is again one of them.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch

GRID_BITS = 52
MASK64 = 2**64 - 1


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
    key = np.array([seed & MASK64, 16 * split + purpose], dtype=np.uint64)
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
