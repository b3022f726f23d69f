"""Rows of prompts and responses: the pairs that they hold, and their padding."""

from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_mdm.mcore.data.pair_dataset import PackedPairDataset, PairDataset, PairDatasetConfig
from tests import ranks

COUNT, LENGTH = 120, 20
PAIRS = ranks.random_pairs(COUNT)


@pytest.fixture
def rows(pairs):
    """A function from (class, multiple, split) to the dataset of pairs in rows of LENGTH tokens."""

    def build(cls, multiple=1, split=Split.train):
        config = PairDatasetConfig(
            random_seed=3,
            sequence_length=LENGTH,
            split="1,0,0",
            tokenizer=SimpleNamespace(
                eod=ranks.EOD_ID, vocab_size=ranks.VOCAB, unique_identifiers={}
            ),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            response_multiple=multiple,
        )
        return cls(IndexedDataset(str(pairs)), "pairs", np.arange(COUNT), None, split, config)

    return build


def fitting(multiple):
    """The pairs that fit into a row, with responses filled up by ends to the multiple."""
    padded = [(p, r + [ranks.EOD_ID] * (-len(r) % multiple)) for p, r in PAIRS]
    return [(p, r) for p, r in padded if len(p) + len(r) <= LENGTH]


def pairs_of(row):
    """(prompt, response) of each pair in a row."""
    tokens, document = (row[name][: row["num_tokens"]] for name in ("tokens", "document"))
    is_prompt = row["prompt"][: row["num_tokens"]]
    return [
        (tokens[at & is_prompt].tolist(), tokens[at & ~is_prompt].tolist())
        for at in (document == number for number in range(document.max() + 1))
    ]


@pytest.mark.parametrize("multiple", [1, 4, 7])
@pytest.mark.parametrize("cls", [PairDataset, PackedPairDataset])
def test_an_epoch_has_every_pair_that_fits_once(cls, multiple, rows, capsys):
    """Pairs that are too long, with the padding of packed ones, are left out and counted."""
    dataset = rows(cls, multiple)
    is_packed = cls is PackedPairDataset
    multiple = multiple if is_packed else 1
    expected = fitting(multiple)
    left_out = COUNT - len(expected)
    assert 10 < left_out < 90
    padding = f" padded to multiples of {multiple}," if multiple > 1 else ""
    said = f"{len(expected)} pairs,{padding} {left_out} left out, longer than {LENGTH},"
    output = capsys.readouterr().out
    assert f" > train split of pairs: {said} in {len(dataset)} rows\n" in output

    found = [pairs_of(dataset[i]) for i in range(len(dataset))]
    assert sorted(pair for row in found for pair in row) == sorted(expected)
    assert (max(map(len, found)) > 1) == is_packed
    assert all(row["tokens"].shape == (LENGTH,) for row in (dataset[0], dataset[1]))


def test_evaluations_have_one_pair_a_row_with_the_padding_of_training(rows):
    for multiple in (1, 7):
        dataset = rows(PackedPairDataset, multiple, Split.valid)
        found = [pairs_of(dataset[i]) for i in range(len(dataset))]
        assert all(len(row) == 1 for row in found)
        assert sorted(row[0] for row in found) == sorted(fitting(multiple))
