"""Quantiles of rows: each is uniform, and together they are stratified.

Seeds are fixed, and error probabilities are corrected for the number of tests.
"""

from itertools import permutations, product
from math import factorial

import numpy as np
import pytest
from scipy import stats

from megatron_mdm.objective import quantiles as quantiles_module
from megatron_mdm.objective.quantiles import PHI64, Quantiles
from megatron_mdm.objective.randomness import GRID_BITS, Split
from tests.objective.draws import ALPHA, NUM_TESTS, unit


@pytest.mark.parametrize("kind", ["iid", "strata", "lattice"])
def test_a_rows_quantile_is_uniform_over_seeds(kind):
    q = unit([Quantiles(kind, seed, Split.TRAIN, 10, 4)(13) for seed in range(4000)])
    assert stats.kstest(q, "uniform").pvalue > ALPHA / NUM_TESTS


def test_iid_quantiles_are_uniform_and_independent():
    quantiles = Quantiles("iid", 3, Split.TRAIN)
    q = unit([quantiles(i) for i in range(20_000)])
    assert stats.kstest(q, "uniform").pvalue > ALPHA / NUM_TESTS
    table = np.histogram2d(q[:-1], q[1:], bins=10, range=[[0, 1], [0, 1]])[0]
    assert stats.chi2_contingency(table).pvalue > ALPHA / NUM_TESTS


@pytest.mark.parametrize("start", [0, 17, 10**9, 2**40])
@pytest.mark.parametrize("size", [8, 100, 256])
def test_every_window_of_the_lattice_is_nearly_stratified(start, size):
    """Any rows [start, start + size) have at most 3 distinct gaps, the largest below 3/size."""
    quantiles = Quantiles("lattice", 11, Split.TRAIN)
    q = np.sort(unit([quantiles(start + i) for i in range(size)]))
    gaps = np.diff(np.concatenate([q, [q[0] + 1.0]]))
    assert gaps.max() < 3.0 / size
    assert len(np.unique(np.round(gaps, 9))) <= 3  # the three-gap theorem


def test_lattice_arithmetic_is_exact_for_huge_rows():
    quantiles = Quantiles("lattice", 1, Split.TRAIN)
    row = 2**50 + 12345
    step = ((quantiles(row + 1) - quantiles(row)) << (64 - GRID_BITS)) % 2**64
    assert abs(step - PHI64) <= 2 ** (64 - GRID_BITS)


@pytest.mark.parametrize(("window", "strata"), [(16, 4), (16, 16), (10, 3), (7, 7), (5, 1)])
def test_strata_hold_equal_numbers(window, strata):
    quantiles = Quantiles("strata", 2, Split.TRAIN, window, strata)
    for w in range(50):
        q = unit([quantiles(w * window + i) for i in range(window)])
        counts = np.bincount((q * strata).astype(int), minlength=strata)
        assert counts.max() - counts.min() <= (0 if window % strata == 0 else 1)


def test_strata_are_shuffled():
    quantiles = Quantiles("strata", 2, Split.TRAIN, 16, 16)
    first = [quantiles(16 * w) * 16 >> GRID_BITS for w in range(800)]
    assert stats.chisquare(np.bincount(first, minlength=16)).pvalue > ALPHA / NUM_TESTS


@pytest.mark.parametrize("row", [0, 1, 12_345, 10**12])
def test_the_quantile_of_a_row_is_uniform_over_offsets_of_the_lattice(monkeypatch, row):
    """Sixteen equally spaced offsets, in place of all 2^64, give equally spaced quantiles."""
    lattice = Quantiles("lattice", 1, Split.TRAIN)
    found = []
    for i in range(16):
        monkeypatch.setattr(quantiles_module, "_offset", lambda *_, i=i: i << 60)
        found.append([lattice(row), *map(int, lattice.of_documents(row, 3))])
    for quantiles in zip(*found, strict=True):
        assert set(np.diff(sorted(quantiles))) == {2**GRID_BITS // 16}


@pytest.mark.parametrize(("window", "strata"), [(4, 2), (4, 4), (3, 2), (4, 3), (2, 1)])
def test_the_quantile_of_a_row_is_uniform_over_the_draws_of_strata(monkeypatch, window, strata):
    """Over all orders of rows and grids of angles and places, each cell is equally frequent."""
    quantiles = Quantiles("strata", 1, Split.TRAIN, window, strata)
    shift, places, angles = 64 - GRID_BITS, 4, window * strata
    counts = np.zeros((window, strata * places), dtype=int)
    draws = product(permutations(range(window)), range(angles), range(places))
    for order, angle, place in draws:
        inside, turn = (2 * place + 1, 2 * places), (2 * angle + 1, 2 * angles)
        grid = [
            numerator * 2**GRID_BITS // parts for numerator, parts in [inside] * window + [turn]
        ]
        bits = np.array([*order, *(number << shift for number in grid)], dtype=np.uint64)
        monkeypatch.setattr(Quantiles, "_bits", lambda *_, bits=bits: bits)
        drawn = quantiles_module.stratified_window.__wrapped__(quantiles, 0)
        for row, quantile in enumerate(drawn):
            counts[row, quantile * strata * places >> GRID_BITS] += 1
    assert (counts == factorial(window) * window).all()
