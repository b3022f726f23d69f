"""Data files that are damaged or missing end with one clear line that names them."""

import numpy as np
import pytest

from megatron_mdm.errors import UserError
from megatron_mdm.mcore.flags import data_files
from tests import ranks


def truncate(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def damage(path, at, value):
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(bytes(content))


FILES = {
    "missing bin": (lambda b, i: b.unlink(), "{b} does not exist"),
    "missing idx": (lambda b, i: i.unlink(), "{i} does not exist"),
    "empty bin": (lambda b, i: truncate(b, 0), "{b} is empty"),
    "empty idx": (lambda b, i: truncate(i, 0), "{i} is empty"),
    "truncated bin": (lambda b, i: truncate(b, 0.5), "{b} has 148 bytes where its index says 296"),
    "header cut": (lambda b, i: i.write_bytes(i.read_bytes()[:20]), "{i} is not a Megatron index"),
    "lengths cut": (lambda b, i: truncate(i, 0.5), "{i} is not a Megatron index"),
    "end cut": (lambda b, i: i.write_bytes(i.read_bytes()[:-1]), "{i} is not a Megatron index"),
    "other magic": (lambda b, i: damage(i, 0, b"X"), "wrong header"),
    "other version": (lambda b, i: damage(i, 9, b"\7"), "version 7"),
    "unknown type": (lambda b, i: damage(i, 17, b"\77"), "{i} is not a Megatron index"),
    "wrong count": (lambda b, i: damage(i, 18, b"\377" * 8), "{i} is not a Megatron index"),
    "wrong length": (lambda b, i: damage(i, 34, b"\1"), "lengths and positions differ"),
    "wrong position": (lambda b, i: damage(i, 34 + 3 * 4 + 8, b"\1"), "positions differ"),
    "last length": (lambda b, i: damage(i, 34 + 2 * 4, b"\1"), "{b} has 296 bytes where"),
}


@pytest.fixture
def files(tmp_path):
    prefix = tmp_path / "text"
    ranks.write_documents(prefix, [[5] * 30, [6] * 4, [7] * 40])
    return prefix


@pytest.mark.parametrize("case", FILES)
def test_damaged_files(case, files):
    data_files.check_data_files(([str(files)], None), None)
    change, message = FILES[case]
    paths = {"b": files.with_suffix(".bin"), "i": files.with_suffix(".idx")}
    change(*paths.values())
    for blend in [(([str(files)], None), None), (None, [None, ([str(files)], None), None])]:
        with pytest.raises(UserError) as caught:
            data_files.check_data_files(*blend)
        assert message.format(**paths) in str(caught.value)


def test_an_index_of_nothing(tmp_path):
    ranks.write_documents(tmp_path / "text", [])
    (tmp_path / "text.bin").write_bytes(b"1234")
    with pytest.raises(UserError, match="text.idx lists no documents"):
        data_files.check_data_files(([str(tmp_path / "text")], None), None)


def test_an_index_in_several_parts(tmp_path):
    """Lengths and positions are compared in parts of 2^20 documents."""
    count = (1 << 20) + 5
    start = 9 + 8 + 1 + 16
    ranks.write_documents(tmp_path / "text", [[1, 2]])
    idx = tmp_path / "text.idx"
    header = idx.read_bytes()[:18]
    arrays = [
        np.array([count, count + 1], np.int64),
        np.full(count, 2, np.int32),
        np.arange(count, dtype=np.int64) * 8,
        np.arange(count + 1, dtype=np.int64),
    ]
    idx.write_bytes(header + b"".join(array.tobytes() for array in arrays))
    assert data_files.indexed_bytes(str(idx)) == 8 * count
    damage(idx, start + 4 * count + 8 * (count - 2), b"\1")
    with pytest.raises(ValueError, match="positions differ"):
        data_files.indexed_bytes(str(idx))


def test_no_data():
    with pytest.raises(UserError, match="give --data-path"):
        data_files.check_data_files(None, None)


def test_documents_without_an_end_cannot_divide_rows(tmp_path):
    """A document of two sequences (split sentences, say) needs an end only after the last."""
    ended, cut = tmp_path / "ended", tmp_path / "cut"
    ranks.write_pairs(ended, ranks.random_pairs(20))
    ranks.write_documents(cut, [[5, ranks.EOD_ID, 6], [], [7]])
    blend = ([str(ended)], None)
    data_files.check_ends_of_documents(blend, None, ranks.EOD_ID)
    for wrong in (([str(ended), str(cut)], None), None), (None, [blend, ([str(cut)], None), None]):
        with pytest.raises(UserError, match=f"{cut}.bin ends with .* end of document, 119, which"):
            data_files.check_ends_of_documents(*wrong, ranks.EOD_ID)
