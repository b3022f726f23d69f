"""Uniform samples of as many items as reach a size together.

Imports nothing beyond the standard library, because worker processes import this module.
"""

import heapq
import random
from collections.abc import Callable, Sequence


def drawn(sizes: Sequence[int], total: int, enough: int, seed: int = 0) -> list[int]:
    """Items of known sizes, drawn one after another until they reach a size together.

    It takes as long as the items that are drawn are many: there may be billions of others.

    Args:
        sizes: of all items.
        total: of all items together.
        enough: size that the items are to reach together; all of them if they do not.
        seed: of the draws.

    Returns:
        Their numbers, ascending.
    """
    if total <= enough:
        return list(range(len(sizes)))
    draw, taken, size = random.Random(seed).randrange, set[int](), 0
    while size < enough:
        number = draw(len(sizes))
        if number not in taken:
            taken.add(number)
            size += int(sizes[number])
    return sorted(taken)


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
