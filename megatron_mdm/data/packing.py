"""Packs texts of given lengths into rows of one length."""

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

from megatron_mdm.objective.types import Integers


def pack(lengths: npt.ArrayLike, row_length: int) -> tuple[Integers, Integers]:
    """Packs texts greedily: each goes into the fullest row that has room for it (best fit).

    Args:
        lengths: lengths of the texts in the order in which they are placed, int [n], each from 1 to
            `row_length`.
        row_length: tokens in a row.

    Returns:
        The indices of the texts, sorted by row, int64 [n]; and the offset of each row's first text
        in them, int64 [rows + 1]. Inside a row the texts keep their order.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    shortest = int(sizes.min(initial=row_length))
    row_of = np.empty(len(sizes), dtype=np.int64)
    rooms: list[int] = []  # the different free sizes of open rows, ascending
    open_rows: dict[int, list[int]] = {}  # free size -> open rows
    num_rows = 0
    for text, size in enumerate(sizes.tolist()):
        place = bisect_left(rooms, size)
        if place < len(rooms):
            room = rooms[place]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[place]
        else:
            room, row = row_length, num_rows
            num_rows += 1
        row_of[text] = row
        left = room - size
        if left >= shortest:  # otherwise no text fits, and the row is closed
            if left not in open_rows:
                insort(rooms, left)
                open_rows[left] = []
            open_rows[left].append(row)
    order = np.argsort(row_of, kind="stable")
    starts = np.concatenate([[0], np.bincount(row_of, minlength=num_rows).cumsum()])
    return order, starts.astype(np.int64)
