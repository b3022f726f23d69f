"""The state of online P-POTS in a checkpoint."""

import numpy as np
import pytest
import torch

from megatron_mdm.config import MOST_PPOTS_BINS, MDMConfig
from megatron_mdm.errors import UserError
from megatron_mdm.objective.ppots.exact_sums import LIMBS
from megatron_mdm.objective.ppots.fit import fit
from megatron_mdm.objective.ppots.moments import RateMoments, accumulate
from megatron_mdm.objective.ppots.state import TABLE_SIZE, PpotsState
from megatron_mdm.objective.samplers import PiecewiseSampler
from tests import ROOT
from tests.objective.ppots.measurements import moments_of, power_moment


@pytest.mark.parametrize("family", ["epr", "power", "piecewise", None])
def test_state_is_restored_bit_for_bit(family):
    moments = moments_of(power_moment)
    moments.update([0.5, 0.7], [np.nan, 1 / 3], [1.0, 1.0])
    moments.decay(0.7)
    uniform = PiecewiseSampler([0, 1], [1, 1])
    sampler = fit(moments, family=family).sampler() if family else uniform
    since = accumulate(torch.tensor([0.3]), torch.tensor([0.1]), torch.tensor([1.7]), 30)
    vector = PpotsState(sampler, moments, since.numpy()).state_vector()
    assert vector.dtype == np.int64 and vector.shape == (1 + 2 * TABLE_SIZE + (1 + LIMBS) * 121,)
    restored = PpotsState.from_state_vector(vector, 30)
    assert restored.sampler == sampler and restored.moments == moments
    np.testing.assert_array_equal(restored.state_vector(), vector)
    quantile = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for got, expected in zip(restored.sampler(quantile), sampler(quantile), strict=True):
        assert torch.equal(got, expected)
    assert fit(restored.moments) == fit(moments)


def test_the_readme_says_how_large_the_state_is():
    uniform = PiecewiseSampler([0, 1], [1, 1])
    size = 8 * len(PpotsState.start(uniform, MDMConfig().ppots_bins).state_vector())
    assert MDMConfig().ppots_bins == 30 and size == 21_232
    page = ROOT / "megatron_mdm/objective/ppots/README.md"
    readme = " ".join(page.read_text(encoding="utf-8").split())
    assert f"At 30 bins a checkpoint carries {size / 1000:.0f} kB of state" in readme


def test_state_of_another_number_of_bins_is_refused():
    vector = PpotsState.start(PiecewiseSampler([0, 1], [1, 1]), 30).state_vector()
    with pytest.raises(
        UserError, match="do not have 20 bins, or another version.*: resume with .*'s number"
    ):
        PpotsState.from_state_vector(vector, 20)


@pytest.mark.parametrize(
    ("index", "value"),
    [
        *[(0, size) for size in (np.nan, np.inf, -1.0, 1.0, 1.5, 9.0, 1e300)],
        *[(1, -1.0), (1 + 2 * TABLE_SIZE, -1.0), (-1, -1.0)],
    ],
)
def test_damaged_state_is_refused(index, value):
    vector = PpotsState.start(PiecewiseSampler([0, 1], [1, 1]), 30).state_vector()
    vector[index] = np.array(value).view(np.int64)
    with pytest.raises(UserError, match="damaged"):
        PpotsState.from_state_vector(vector, 30)


def test_a_table_that_is_too_long_is_refused():
    edges = np.linspace(0, 1, TABLE_SIZE + 1)
    state = PpotsState.start(PiecewiseSampler(edges, np.ones_like(edges)), 3)
    with pytest.raises(ValueError, match="does not fit"):
        state.state_vector()


def test_as_many_bins_as_the_flag_allows_find_room_in_a_checkpoint():
    moments = RateMoments(MOST_PPOTS_BINS)
    t = (np.arange(MOST_PPOTS_BINS) + 0.5) / MOST_PPOTS_BINS
    moments.update(t, 1 + t, np.ones_like(t))
    sampler = fit(moments, family="piecewise").sampler()
    assert len(sampler.edges) == TABLE_SIZE
    PpotsState.start(sampler, MOST_PPOTS_BINS).state_vector()
    with pytest.raises(UserError, match="must lie in"):
        RateMoments(MOST_PPOTS_BINS + 1)
