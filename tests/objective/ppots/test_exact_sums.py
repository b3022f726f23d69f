"""Integer sums of moments: equal in every order, and refused if no rows can have such sums."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from megatron_mdm.errors import UserError
from megatron_mdm.objective.ppots.exact_sums import from_limbs, to_limbs
from megatron_mdm.objective.ppots.moments import RateMoments, accumulate
from megatron_mdm.objective.ppots.state import PpotsState
from megatron_mdm.objective.samplers import PiecewiseSampler


def test_sums_do_not_depend_on_how_they_are_taken():
    """Numbers of both signs and very different sizes sum exactly, in any order and any parts."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal(3000) * 10.0 ** rng.uniform(-9, 12, 3000)
    limbs = to_limbs(torch.from_numpy(x))
    exact = float(sum(map(Fraction, x)))
    sums = [limbs.sum(1), limbs.flip(1).cumsum(1)[:, -1], limbs[:, ::3].sum(1)]
    sums[2] += limbs[:, 1::3].sum(1) + limbs[:, 2::3].sum(1)
    assert {float(from_limbs(total[:, None])[0]) for total in sums} == {exact}
    assert x.sum() != exact  # sums of floating-point numbers are rounded
    ends = torch.tensor([2.0**50 - 2.0**-3, -(2.0**-70), 2.0**-71, 0.0], dtype=torch.float64)
    assert from_limbs(to_limbs(ends)).tolist() == [*ends[:2].tolist(), 0.0, 0.0]


@pytest.mark.parametrize(
    "place, value, message",
    [
        (2, 1e300, "sums that are too large for their rows"),
        (0, 2.0**60, "sums that are too large for their rows"),
        (3, 2.0**62, "counts 4.612e+18 rows, but at most 100 are possible"),
        (-1, 1e6, "counts 1e+06 rows, but at most 100 are possible"),
    ],
)
def test_moments_of_more_or_larger_rows_than_there_were(place, value, message):
    state = PpotsState.start(PiecewiseSampler([0, 1], [1, 1]), 4)
    state.moments.update([0.1, 0.6, 0.9], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    PpotsState.from_state_vector(state.state_vector(), 4, most_rows=100)
    bins = slice(None) if place == -1 else slice(4 * place, 4 * place + 1)
    vector = state.moments.vector()
    vector[-1 if place == -1 else bins] = value
    state.moments = RateMoments.from_vector(vector)
    with pytest.raises(UserError, match=re.escape(message)):
        PpotsState.from_state_vector(state.state_vector(), 4, most_rows=100)


def test_exact_sums_of_more_rows_than_there_were():
    state = PpotsState.start(PiecewiseSampler([0, 1], [1, 1]), 4)
    state.pending += accumulate(torch.tensor([0.3]), torch.tensor([1.0]), torch.ones(1), 4).numpy()
    PpotsState.from_state_vector(state.state_vector(), 4, most_rows=1)
    state.pending[:, 13] *= 5  # the number of rows in the second bin
    with pytest.raises(UserError, match="it counts 5 rows, but at most 1 are possible"):
        PpotsState.from_state_vector(state.state_vector(), 4, most_rows=1)
