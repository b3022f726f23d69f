"""Rows of text hold each token once per epoch, in an order independent of the run's length."""

import errno
import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_mdm.config import MDMConfig
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.data.dataset_helpers import use_shipped_dataset_helpers
from megatron_mdm.mcore.data.index_cache import DatasetBuilder, KeyedDatasetConfig
from megatron_mdm.mcore.data.row_dataset import RowDataset
from megatron_mdm.mcore.data.text_dataset import CleanTokensDataset, EpochDataset
from tests import ranks

LENGTH = 16


class Tokenizer(SimpleNamespace):
    """The attributes of a tokenizer that Megatron uses here."""

    unique_identifiers = {"class": "numbers"}  # noqa: RUF012


@pytest.fixture
def build(tmp_path):
    """A function that builds (train, valid, test) datasets of documents, with sizes in rows."""
    use_shipped_dataset_helpers()

    def make(documents, sizes, kind=EpochDataset, split="100,0,0", seed=1, blend=None, **settings):
        path = str(tmp_path / "text")
        if documents is not None:
            ranks.write_documents(tmp_path / "text", documents)
        config = KeyedDatasetConfig(
            random_seed=seed,
            sequence_length=LENGTH,
            blend=blend or ([path], None),
            split=split,
            path_to_cache=str(tmp_path / "cache"),
            tokenizer=Tokenizer(vocab_size=10**6, pad=-1, eod=0, special_tokens_dict={}),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            add_extra_token_to_sequence=False,
            **settings,
        )
        return DatasetBuilder(kind, sizes, lambda: True, config).build()

    return make


def numbered(lengths):
    """Documents in which every token is a different number."""
    first = np.concatenate([[0], np.cumsum(lengths)])
    return [list(range(a, b)) for a, b in itertools.pairwise(first)]


LENGTHS = [5, 40, 3, 1, 17, 16, 33, 2, 64, 9]  # 190 tokens: 11 rows of 16, and 14 tokens more


def rows(dataset, start, count):
    return [dataset[i]["tokens"].tolist() for i in range(start, start + count)]


def test_the_order_does_not_depend_on_the_length_of_the_run(build):
    short = build(numbered(LENGTHS), [5, 0, 0])[0]
    for size in (11, 12, 40, 1000):
        long = build(None, [size, 0, 0])[0]
        assert len(long) == max(11, size)
        assert rows(long, 0, 5) == rows(short, 0, 5)
        assert long.texts_per_epoch == 11
    # Megatron's own order does depend on it, which this test is able to detect.
    old = [build(None, [size, 0, 0], CleanTokensDataset)[0] for size in (5, 40)]
    assert rows(old[0], 0, 5) != rows(old[1], 0, 5)


def test_every_epoch_has_every_row_once_and_leaves_out_less_than_a_row(build):
    dataset = build(numbered(LENGTHS), [110, 0, 0])[0]
    left_out = Counter()
    for epoch in range(10):
        tokens = [token for row in rows(dataset, 11 * epoch, 11) for token in row]
        assert len(set(tokens)) == len(tokens) == 176
        left_out.update(set(range(190)) - set(tokens))
    assert len(left_out) > 60  # different tokens each time
    assert max(left_out.values()) <= 5


def test_epochs_have_orders_and_cuts_of_their_own(build):
    dataset = build(numbered(LENGTHS), [110, 0, 0])[0]
    epochs = [rows(dataset, 11 * epoch, 11) for epoch in range(10)]
    assert len({tuple(row[0] for row in epoch) for epoch in epochs}) == 10
    firsts = {frozenset(row[0] for row in epoch) for epoch in epochs}
    assert len(firsts) > 5
    other = build(None, [110, 0, 0], seed=2)[0]
    assert rows(other, 0, 11) != epochs[0]


def test_tokens_follow_one_another_as_in_the_documents(build):
    """Each token of a row is followed by its successor or by another document's first token."""
    dataset = build(numbered(LENGTHS), [44, 0, 0])[0]
    starts = set(np.concatenate([[0], np.cumsum(LENGTHS)]).tolist())
    ends = {start - 1 for start in starts}
    for row in rows(dataset, 0, 44):
        for one, other in itertools.pairwise(row):
            assert other == one + 1 or (one in ends and other in starts)


def test_data_that_was_packed_into_rows_keeps_its_rows(build):
    documents = numbered([LENGTH] * 12)
    dataset = build(documents, [36, 0, 0])[0]
    for epoch in range(3):
        found = rows(dataset, 12 * epoch, 12)
        assert sorted(found) == documents
        assert found != documents


@pytest.mark.parametrize("lengths", [[16], [20], [15, 2, 100], [1] * 40])
def test_small_data(lengths, build):
    total = sum(lengths)
    dataset = build(numbered(lengths), [50, 0, 0])[0]
    n = total // LENGTH
    assert dataset.texts_per_epoch == n
    for epoch in range(50 // n):
        tokens = [token for row in rows(dataset, n * epoch, n) for token in row]
        assert len(set(tokens)) == len(tokens) == n * LENGTH


def test_evaluations_repeat_their_rows_and_say_which(build):
    documents = numbered(LENGTHS * 2)
    few = build(documents, [10, 4, 0], split="50,50,0")[1]
    many = build(None, [10, 60, 0], split="50,50,0")[1]
    n = many.texts_per_epoch
    assert rows(few, 0, 4) == rows(many, 0, 4)
    assert rows(many, 0, n) == rows(many, n, n)
    texts = [many[i]["text"] for i in range(2 * n)]
    assert texts[:n] == texts[n:] and sorted(texts[:n]) == list(range(n))


def test_blends_do_not_depend_on_the_length_either(build, tmp_path):
    paths = [str(tmp_path / name) for name in ("one", "two")]
    for path, lengths in zip(paths, (LENGTHS, [100, 7, 90]), strict=True):
        ranks.write_documents(tmp_path / path, numbered(lengths))
    blend = (paths, [0.7, 0.3])
    short, long = (build(None, [n, 0, 0], blend=blend)[0] for n in (10, 200))
    assert [(a["dataset_id"], a["tokens"].tolist()) for a in map(short.__getitem__, range(10))] == [
        (a["dataset_id"], a["tokens"].tolist()) for a in map(long.__getitem__, range(10))
    ]


def test_evaluations_that_take_more_rows_than_files_without_weights_hold_are_equal(build, tmp_path):
    """The files hold 11 and 2 rows. An evaluation of 16 takes the first three a second time."""
    paths = [str(tmp_path / name) for name in ("a", "b")]
    for path, lengths in zip(paths, (LENGTHS, [35]), strict=True):
        ranks.write_documents(path, numbered(lengths))
    few = build(None, [0, 16, 0], split="0,100,0", blend=(paths, None))[1]
    assert len(few) == 13
    dataset = RowDataset(few, MDMConfig(), 1, None, vocab_size=10**6, pad_id=0, period=16)
    read = [{name: x.tolist() for name, x in dataset[i].items()} for i in range(48)]
    assert [row["row"] for row in read[:16]] == [*range(13), 0, 1, 2]
    assert read[:16] == read[16:32] == read[32:]


def test_megatrons_deferred_index_gives_the_same_rows(build):
    one = build(numbered(LENGTHS), [40, 0, 0])[0]
    other = build(None, [40, 0, 0], defer_npy_index_mmap=True)[0]
    assert rows(other, 0, 40) == rows(one, 0, 40)


def test_a_full_disk_leaves_no_part_of_an_index(build, tmp_path, monkeypatch):
    save = np.save

    def fill(file, array, **settings):
        save(file, array, **settings)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", fill)
    with pytest.raises(UserError, match="No space left on device"):
        build(numbered(LENGTHS), [40, 0, 0])
    assert not list((tmp_path / "cache").glob("*.npy*"))


def test_strides_and_shifts_are_spread_evenly(build):
    """Chi-squared tests of shifts, first rows and strides over 400 epochs."""
    dataset = build(numbered(LENGTHS), [10, 0, 0])[0]
    epochs = [dataset._epoch(number) for number in range(400)]
    shifts = np.histogram([e.shift for e in epochs], bins=10, range=(0, 190))[0]
    starts = np.bincount([e.start for e in epochs], minlength=11)
    strides = np.bincount([e.stride for e in epochs], minlength=11)
    assert strides[0] == 0
    for counts in (shifts, starts, strides[1:]):
        expected = counts.sum() / len(counts)
        assert ((counts - expected) ** 2 / expected).sum() < 30  # 10 degrees of freedom: p < 0.001
