"""Packing of texts into rows."""

import itertools

import numpy as np
import pytest

from megatron_mdm.data.packing import pack


def rooms(lengths, row_length):
    """The number of tokens in each row, and the texts of each row."""
    order, starts = pack(lengths, row_length)
    rows = [order[a:b].tolist() for a, b in itertools.pairwise(starts)]
    return [sum(lengths[i] for i in row) for row in rows], rows


@pytest.mark.parametrize("longest", [5, 40, 100])
def test_every_text_once_and_no_row_too_long(longest):
    lengths = np.random.default_rng(0).integers(1, longest + 1, 2000).tolist()
    sizes, rows = rooms(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(2000))
    assert all(row and row == sorted(row) for row in rows)
    assert max(sizes) <= 100
    # Best fit: two rows whose texts fit into one row would have been one row.
    least = sorted(sizes)[:2]
    assert sum(least) > 100
    assert len(rows) <= {5: 1.01, 40: 1.03, 100: 1.2}[longest] * sum(lengths) / 100 + 1


def test_the_fullest_row_with_room_is_taken():
    assert rooms([6, 5, 4, 5], 10) == ([10, 10], [[0, 2], [1, 3]])
    assert rooms([10, 10], 10)[1] == [[0], [1]]
    assert rooms([], 10) == ([], [])
