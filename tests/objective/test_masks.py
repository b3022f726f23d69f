import numpy as np
import pytest
import torch
from scipy import stats

from megatron_mdm.objective.masks import bernoulli_mask, exact_count_mask
from megatron_mdm.objective.randomness import Split, row_uniforms, to_unit
from megatron_mdm.objective.rates import masked_count, masking_probability
from megatron_mdm.objective.views import view_uniforms


def uniforms(rows, length):
    return to_unit(
        torch.from_numpy(np.stack([row_uniforms(1, Split.TRAIN, i, length) for i in range(rows)]))
    )


def test_masking_probability_spans_eps_to_one():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert masking_probability(t, 0.1).tolist() == [0.1, 0.55, 1.0]


def test_every_count_is_equally_likely():
    t = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = torch.bincount(masked_count(t, torch.full((1000,), 8)), minlength=9)
    assert counts.tolist() == [0] + [125] * 8


def test_masked_count_bounds():
    t = torch.tensor([1e-300, 1.0, 1.0, 0.3], dtype=torch.float64)
    assert masked_count(t, torch.tensor([7, 7, 0, 1])).tolist() == [1, 7, 0, 1]


def test_masks_stay_inside_the_eligible():
    u = uniforms(50, 20)
    eligible = u.roll(1, dims=1) > 0.4
    t = to_unit(torch.arange(50) << 46).clamp(0.01)
    for mask, _ in (bernoulli_mask(u, eligible, t, 1e-3), exact_count_mask(u, eligible, t)):
        assert not (mask & ~eligible).any()


def test_exact_count_masks_k_and_each_subset_equally():
    u = uniforms(6000, 4)
    eligible = torch.tensor([True, True, False, True]).expand(6000, 4)
    t = torch.full((6000,), 0.5, dtype=torch.float64)  # k = ceil(1.5) = 2 of 3
    mask, weight = exact_count_mask(u, eligible, t)
    assert (mask.sum(dim=1) == 2).all()
    assert weight.unique().tolist() == [1.5]
    patterns = torch.bincount((mask * torch.tensor([1, 2, 4, 8])).sum(dim=1))
    assert stats.chisquare(patterns[patterns > 0]).pvalue > 0.001
    assert (patterns > 0).sum() == 3


def test_bernoulli_rate_and_weight():
    t = torch.full((4000,), 0.3, dtype=torch.float64)
    eligible = torch.ones(4000, 8, dtype=torch.bool)
    mask, weight = bernoulli_mask(uniforms(4000, 8), eligible, t, 1e-3)
    p = 0.999 * 0.3 + 1e-3
    assert stats.binomtest(int(mask.sum()), mask.numel(), p).pvalue > 0.001
    assert weight.unique().tolist() == pytest.approx([1 / p])


def test_mirror_pairs_have_exactly_the_correlation_of_theory():
    """Counted over an even grid of u, with no sampling: -min(p/(1-p), (1-p)/p) at a position."""
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
