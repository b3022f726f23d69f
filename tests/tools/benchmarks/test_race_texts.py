"""Texts written from masks alone and read by a judge, with distributions given by hand."""

import math

import numpy as np
import pytest
import torch

from benchmarks.race import texts
from megatron_mdm.generation.decoder import Decoder

MASK = 3


def bigram(tokens):
    """Logits of a model that repeats a token with probability 1/2; the others have 1/4 each."""
    before = torch.nn.functional.one_hot(tokens, 3).double() * math.log(2)
    return torch.cat([torch.zeros_like(before[:, :1]), before[:, :-1]], dim=1)


def test_the_nll_of_a_row_leaves_out_its_first_token():
    rows = np.array([[0, 0, 0, 0], [0, 1, 1, 2], [2, 1, 0, 2]] * 50)
    found = texts.read(bigram, rows)
    half, quarter = math.log(2), math.log(4)
    expected = [half, (2 * quarter + half) / 3, quarter]
    np.testing.assert_allclose(found, expected * 50, rtol=1e-12)


def test_repetition_is_less_distinct():
    assert texts.distinct(np.array([[1, 1, 1, 1, 1, 1]])) == pytest.approx(1 / 3)
    assert texts.distinct(np.array([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]])) == pytest.approx(3 / 4)
    assert texts.distinct(np.array([[1, 2, 1, 2]]), size=2) == pytest.approx(2 / 3)


def test_written_rows_are_samples_and_each_has_its_own_random_numbers():
    decoder = Decoder(MASK, steps=2, remasking="random", temperature=1.0)
    shares = torch.tensor([0.5, 0.3, 0.2, 0.0])

    def logits(tokens):
        return shares.log().expand(*tokens.shape, 4)

    rows = texts.write(logits, decoder, 200, 8, seed=1)
    assert rows.shape == (200, 8) and rows.max() < MASK
    # 1,600 tokens; the tolerance is four standard errors.
    found = np.bincount(rows.ravel(), minlength=3) / rows.size
    np.testing.assert_allclose(found, shares[:3], atol=0.05)
    assert np.array_equal(rows[:70], texts.write(logits, decoder, 70, 8, seed=1))
    assert not np.array_equal(rows[:70], texts.write(logits, decoder, 70, 8, seed=2))
