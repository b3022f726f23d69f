"""Views of one mask: the two masks of a MIRROR pair are as different as masks can be."""

import numpy as np
import pytest
import torch
from scipy import stats

from megatron_mdm.objective.masks import bernoulli_mask, exact_count_mask
from megatron_mdm.objective.randomness import Split, row_uniforms, to_unit
from megatron_mdm.objective.views import view_uniforms


def test_mirror_pairs_have_exactly_the_correlation_of_theory():
    """An even grid of u, without sampling, gives -min(p/(1-p), (1-p)/p) at a position."""
    n = 1000
    k = (np.arange(n, dtype=np.int64) << 52) // n + (1 << 51) // n
    u, mirrored = (to_unit(torch.from_numpy(view_uniforms(k, j, 2)))[:, None] for j in (0, 1))
    everywhere = torch.ones(n, 1, dtype=torch.bool)
    for p in (0.1, 0.3, 0.5, 0.7, 0.95):
        t = torch.full((n,), p, dtype=torch.float64)
        a, b = (bernoulli_mask(x, everywhere, t, 1e-300)[0].double() for x in (u, mirrored))
        assert a.mean() == b.mean() == p
        correlation = ((a * b).mean() - p * p) / (p * (1 - p))
        assert float(correlation) == pytest.approx(-min(p / (1 - p), (1 - p) / p), abs=1e-9)
        assert (p > 0.5) or not (a * b).any()
        assert (p < 0.5) or ((a + b) > 0).all()


def test_exact_count_mirror_takes_the_k_largest():
    k = row_uniforms(1, Split.TRAIN, 0, 10)
    t = torch.tensor([0.3], dtype=torch.float64)
    eligible = torch.ones(1, 10, dtype=torch.bool)
    first, second = (
        exact_count_mask(to_unit(torch.from_numpy(view_uniforms(k, j, 2)))[None], eligible, t)[0][0]
        for j in (0, 1)
    )
    order = k.argsort()
    assert sorted(first.nonzero().flatten().tolist()) == sorted(order[:3].tolist())
    assert sorted(second.nonzero().flatten().tolist()) == sorted(order[-3:].tolist())


@pytest.mark.parametrize("views", [1, 2, 3, 4])
def test_each_view_is_uniform_and_they_cover_the_circle(views):
    k = row_uniforms(3, Split.TRAIN, 0, 5000)
    units = [to_unit(torch.from_numpy(view_uniforms(k, j, views))).numpy() for j in range(views)]
    for u in units:
        assert stats.kstest(u, "uniform").pvalue > 0.001
    if views != 2:  # at t = 1/K every position is masked in exactly one view
        assert (sum((u < 1 / views).astype(int) for u in units) == 1).mean() > 0.999
