"""Draws uniform samples of items, up to a given total size."""

import heapq
import random
from collections.abc import Callable

import numpy as np

CHUNK = 2**20  # items whose keys are drawn at once


def drawn(sizes: np.ndarray, enough: int, seed: int = 0) -> list[int]:
    """Draws the sample that a `Reservoir` would hold at the end, for items whose sizes are known.

    There may be billions of items, so there is no Python loop over items.

    Args:
        sizes: sizes of all items, an integer array of shape [items].
        enough: total size that the sample has to reach. If all items together are smaller, the
            sample is all items.
        seed: seed of the random keys.

    Returns:
        The indices of the drawn items, ascending.
    """
    # NumPy's legacy generator, with the state of Python's generator, draws the same numbers.
    _, state, _ = random.Random(seed).getstate()
    draws = np.random.RandomState()
    draws.set_state(("MT19937", np.array(state[:-1], np.uint32), state[-1], 0, 0.0))
    keys, numbers, limit = np.empty(0), np.empty(0, np.int64), 1.0
    for first in range(0, len(sizes), CHUNK):
        new = draws.random_sample(min(CHUNK, len(sizes) - first))
        smaller = np.flatnonzero(new < limit)
        keys = np.concatenate([keys, new[smaller]])
        numbers = np.concatenate([numbers, first + smaller])
        order = np.argsort(keys)
        reached = np.cumsum(sizes[numbers[order]], dtype=np.int64)
        if len(reached) and reached[-1] >= enough:
            order = order[: np.searchsorted(reached, enough) + 1]
            limit = keys[order[-1]]
        keys, numbers = keys[order], numbers[order]
    return sorted(numbers.tolist())


class Reservoir[T]:
    """A uniform sample of a stream, drawn in one pass and in bounded memory.

    Each item gets a random key. The sample is the items with the smallest keys, as many as reach a
    total size.

    The sample depends on the seed and on the order and sizes of the items, but not on their
    contents.

    Args:
        enough: total size that the sample has to reach, if the stream is large enough.
        seed: seed of the random keys.

    Attributes:
        size: total size of the sample; without the item of the largest key it is below `enough`.
    """

    def __init__(self, enough: int, seed: int = 0) -> None:
        self.size = 0
        self._enough = enough
        self._draw = random.Random(seed).random
        self._number = 0
        self._heap: list[tuple[float, int, int, T]] = []  # the item of the largest key is first

    def offer(self, make: Callable[[], tuple[int, T] | None]) -> None:
        """Takes the next item of the stream, if it belongs to the sample so far.

        Args:
            make: returns the size of the item and the item; None to leave the item out. It is not
                called for an item whose key is too large.
        """
        key = self._draw()
        self._number += 1
        if self.size >= self._enough and key >= -self._heap[0][0]:
            return
        made = make()
        if made is None:
            return
        heapq.heappush(self._heap, (-key, self._number, *made))
        self.size += made[0]
        while self.size - self._heap[0][2] >= self._enough:
            self._drop_last()

    def shrink(self, most: int) -> None:
        """Drops the items of the largest keys until the total size is at most `most`."""
        while self.size > most:
            self._drop_last()

    def items(self) -> list[T]:
        """Returns the sample in the order of the stream."""
        return [item for _, _, _, item in sorted(self._heap, key=lambda entry: entry[1])]

    def _drop_last(self) -> None:
        self.size -= heapq.heappop(self._heap)[2]
