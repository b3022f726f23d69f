"""Golden values, uniformity and independence of the random draws.

Seeds are fixed, and error probabilities are corrected for the number of tests.
"""

import numpy as np
import pytest
import torch
from scipy import stats

from megatron_mdm.objective.quantiles import Quantiles
from megatron_mdm.objective.randomness import GRID_BITS, Split, row_length, row_uniforms, to_unit
from tests.objective.draws import ALPHA, NUM_TESTS, unit


def test_golden_values():
    """A change of the random stream would silently change every resumed run."""
    assert row_uniforms(1234, Split.TRAIN, 0, 4).tolist() == GOLDEN["train row 0"]
    assert row_uniforms(1234, Split.TRAIN, 10**12, 2).tolist() == GOLDEN["train row 10^12"]
    assert row_uniforms(1234, Split.VALID, 0, 2).tolist() == GOLDEN["valid row 0"]
    assert [Quantiles("iid", 1234, Split.TRAIN)(i) for i in range(2)] == GOLDEN["iid"]
    assert [Quantiles("lattice", 1234, Split.TRAIN)(i) for i in range(2)] == GOLDEN["lattice"]
    strata = Quantiles("strata", 1234, Split.TRAIN, window=8, strata=3)
    assert [strata(i) for i in range(2)] == GOLDEN["strata"]


GOLDEN = {
    "train row 0": [1507461446366697, 2655908582797320, 3115435859733323, 1501779103692484],
    "train row 10^12": [4339847828626958, 1952875365197839],
    "valid row 0": [1708904279213099, 3825589913221770],
    "iid": [799667007395279, 3349447903494274],
    "lattice": [3807782228806062, 2087560242871894],
    "strata": [1235121755135415, 4349571687806488],
}


def test_unit_is_open_exact_and_symmetric():
    ends = torch.tensor([0, 2**GRID_BITS - 1])
    u = to_unit(ends)
    assert u[0] > 0.0 and u[1] < 1.0
    # The mirror image 1 - u is on the grid too, so MIRROR's second view has the same distribution.
    k = torch.from_numpy(row_uniforms(0, Split.TRAIN, 0, 1000))
    assert torch.equal(1.0 - to_unit(k), to_unit(2**GRID_BITS - 1 - k))


def test_a_longer_row_starts_like_a_shorter_one():
    assert (row_uniforms(5, Split.TRAIN, 3, 64)[:10] == row_uniforms(5, Split.TRAIN, 3, 10)).all()


@pytest.mark.parametrize("split", list(Split))
def test_uniforms_are_uniform(split):
    u = unit([row_uniforms(7, split, row, 128) for row in range(200)])
    assert stats.kstest(u.ravel(), "uniform").pvalue > ALPHA / NUM_TESTS


def test_rows_positions_splits_and_seeds_are_independent():
    def draw(seed, split, shift=0):
        return unit([row_uniforms(seed, split, row + shift, 64) for row in range(400)])

    base = draw(7, Split.TRAIN)
    pairs = {
        "neighbouring rows": (base[:-1], base[1:]),
        "neighbouring positions": (base[:, :-1], base[:, 1:]),
        "splits": (base, draw(7, Split.VALID)),
        "seeds": (base, draw(8, Split.TRAIN)),
    }
    for name, (a, b) in pairs.items():
        # A chi-squared test of a 10 x 10 table detects any dependence, not only correlation.
        table = np.histogram2d(a.ravel(), b.ravel(), bins=10, range=[[0, 1], [0, 1]])[0]
        assert stats.chi2_contingency(table).pvalue > ALPHA / NUM_TESTS, name


def test_a_fraction_of_the_rows_ends_early_after_any_length():
    lengths = [row_length(5, Split.TRAIN, row, 8, 0.25) for row in range(8000)]
    early = [n for row, n in enumerate(lengths) if n < 8]
    # A row chosen to end early has a uniform length from 1 to 8, so an eighth of them are full.
    assert stats.binomtest(len(early), 8000, 0.25 * 7 / 8).pvalue > 0.001
    assert stats.chisquare(np.bincount(early, minlength=8)[1:8]).pvalue > 0.001
    assert min(early) == 1
    assert {row_length(5, Split.TRAIN, row, 8, 0.0) for row in range(100)} == {8}
    everything = [row_length(5, Split.TRAIN, row, 8, 1.0) for row in range(8000)]
    assert stats.chisquare(np.bincount(everything, minlength=9)[1:9]).pvalue > 0.001
