"""Uniform samples of as many items as reach a size together."""

import heapq
import random
from collections.abc import Callable

import numpy as np

CHUNK = 2**20  # items whose keys are drawn at once


def drawn(sizes: np.ndarray, enough: int, seed: int = 0) -> list[int]:
    """The sample that a `Reservoir` holds at the end of a stream, where all sizes are known.

    There may be billions of items: nothing is done for each of them in Python.

    Args:
        sizes: of all items, an integer array of shape [items].
        enough: size that the items are to reach together; all of them if they do not.
        seed: of the keys.

    Returns:
        Their numbers, ascending.
    """
    # NumPy's legacy generator goes on with the state of Python's, and draws the same numbers.
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
    """A sample of a stream, in one pass and in bounded memory.

    The items of a stream with the smallest of random keys, as many as reach a size together.

    Which items these are depends on the seed and on the numbers and sizes of the items, and not on
    what the items hold.

    Args:
        enough: size that the items are to reach together, if those of the stream do.
        seed: of the keys.

    Attributes:
        size: of the items together; without the last one by its key it is below `enough`.
    """

    def __init__(self, enough: int, seed: int = 0) -> None:
        self.size = 0
        self._enough = enough
        self._draw = random.Random(seed).random
        self._number = 0
        self._heap: list[tuple[float, int, int, T]] = []  # the last one by its key first

    def offer(self, make: Callable[[], tuple[int, T] | None]) -> None:
        """Takes the next item of the stream, if it belongs to the sample as things stand.

        Args:
            make: returns the size of the item and the item; None if it is not to count. Is not
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
        """Drops items until the others have at most this size together."""
        while self.size > most:
            self._drop_last()

    def items(self) -> list[T]:
        """The sample, in the order of the stream."""
        return [item for _, _, _, item in sorted(self._heap, key=lambda entry: entry[1])]

    def _drop_last(self) -> None:
        self.size -= heapq.heappop(self._heap)[2]
