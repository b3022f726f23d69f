"""Rows of independent tokens: their best loss, by enumeration and from their likelihood."""

import itertools
import math

import numpy as np
import pytest
from scipy.special import gammaln

from benchmarks.race import unigram

SYMBOLS, CONCENTRATION = 3, 0.4


def log_probability(row, symbols=SYMBOLS, a=CONCENTRATION):
    """Log probability of a row, with its symbol probabilities integrated over the Dirichlet."""
    counts = np.bincount(row, minlength=symbols)
    ends = gammaln(symbols * a) - gammaln(symbols * a + len(row))
    return float(ends + (gammaln(a + counts) - gammaln(a)).sum())


def loss_by_enumeration(row, seen):
    """Mean loss over all masks that leave `seen` tokens visible, and over their masked tokens."""
    losses = []
    for places in itertools.combinations(range(len(row)), seen):
        given = [row[i] for i in places]
        losses += [
            log_probability(given) - log_probability([*given, row[i]])
            for i in range(len(row))
            if i not in places
        ]
    return sum(losses) / len(losses)


def test_the_best_loss_is_that_of_all_rows():
    length = 4
    expected = np.zeros(length)
    for row in itertools.product(range(SYMBOLS), repeat=length):
        chance = math.exp(log_probability(row))
        expected += [chance * loss_by_enumeration(row, seen) for seen in range(length)]
    found = unigram.best_losses(length, SYMBOLS, CONCENTRATION)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_best_loss_of_given_rows_is_that_of_all_their_masks():
    rows = unigram.make_rows(4, 6, SYMBOLS, CONCENTRATION, seed=5)
    expected = np.mean([[loss_by_enumeration(row, m) for m in range(6)] for row in rows], axis=0)
    found = unigram.best_losses_of(rows, SYMBOLS, CONCENTRATION)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_its_mean_over_the_rates_is_the_likelihood():
    rows = unigram.make_rows(20, 64, 32, 0.25, seed=1)
    best = unigram.best_losses_of(rows, 32, 0.25)
    expected = -np.mean([log_probability(row, 32, 0.25) for row in rows]) / 64
    assert best.mean() == pytest.approx(expected, rel=1e-12)
    bins = unigram.per_bin(best, 10)
    assert bins.mean() == pytest.approx(expected, rel=1e-12)
    assert (np.diff(bins) > 0).all()  # fewer visible tokens mean less information
    whole = unigram.per_bin(best, 64)  # one bin for each number of masked tokens, 1 to 64
    np.testing.assert_allclose(whole, best[::-1])


def test_rows_are_of_this_distribution():
    """For 20,000 rows the mean loss has standard error 0.001; the first token's loss has none."""
    rows = unigram.make_rows(20_000, 16, 32, 0.25, seed=1)
    found = unigram.best_losses_of(rows, 32, 0.25)
    expected = unigram.best_losses(16, 32, 0.25)
    assert found[0] == pytest.approx(math.log(32)) == expected[0]
    np.testing.assert_allclose(found, expected, atol=0.01)
    np.testing.assert_allclose(np.bincount(rows[:, 0], minlength=32) / 20_000, 1 / 32, atol=0.006)
    assert np.array_equal(rows, unigram.make_rows(20_000, 16, 32, 0.25, seed=1))
