"""Uniform random numbers of a row: pure functions of (seed, stream, row number).

Rows are numbered by their position in the run. The random numbers are therefore the same under
every parallel layout and after a resume, without communication and without saved state.

A uniform number u is stored as a grid integer k in [0, 2^52), int64, and u = (k + 1/2) 2^-52. Every
such u is exact in float64 and lies strictly inside (0, 1), and 1 - u is such a number too.
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
    """A part of the data. Each has its own streams: validation never repeats training's numbers."""

    TRAIN = 0
    VALID = 1
    TEST = 2


def random_bits(
    seed: int, split: Split, purpose: Purpose, index: int, count: int
) -> npt.NDArray[np.uint64]:
    """The first `count` 64-bit words of stream (seed, split, purpose) at `index`.

    The generator is Philox4x64 (Salmon et al., 2011), keyed by the stream, with `index` in the
    second word of its counter. This gives 2^64 indices of 2^66 words each, which never overlap.
    NumPy keeps raw words stable across versions, but not its distribution methods.

    Args:
        seed: any integer, taken modulo 2^64.
        split: part of the data.
        purpose: what the words are used for.
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
    """The 52 leading bits of each word: grid integers, which `to_unit` maps to (0, 1)."""
    return (words >> np.uint64(64 - GRID_BITS)).view(np.int64)


def to_unit(grid: torch.Tensor) -> torch.Tensor:
    """(k + 1/2) 2^-52 in float64, strictly inside (0, 1), exact."""
    return (grid.to(torch.float64) + 0.5) * 2.0**-GRID_BITS


def row_uniforms(seed: int, split: Split, row: int, length: int) -> npt.NDArray[np.int64]:
    """One uniform per position of a row, as grid integers [length]."""
    return to_grid(random_bits(seed, split, Purpose.MASK, row, length))


def row_length(seed: int, split: Split, row: int, longest: int, fraction: float) -> int:
    """Length of a row when a random fraction of the rows is shortened.

    A shortened row has a length of 1 to `longest`, each equally likely. Other rows have `longest`.

    Args:
        seed: seed of the run.
        split: part of the data.
        row: row number.
        longest: length of rows that are not shortened.
        fraction: share of rows that are shortened, in [0, 1].
    """
    whether, where = to_grid(random_bits(seed, split, Purpose.LENGTH, row, 2)).tolist()
    return 1 + (where * longest >> GRID_BITS) if whether < fraction * 2**GRID_BITS else longest
