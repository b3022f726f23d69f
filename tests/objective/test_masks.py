"""Masks stay inside the eligible tokens, and have the theoretical rate and weight."""

import numpy as np
import pytest
import torch
from scipy import stats

from megatron_mdm.objective.masks import bernoulli_mask, exact_count_mask
from megatron_mdm.objective.randomness import Split, row_uniforms, to_unit


def uniforms(rows, length):
    return to_unit(
        torch.from_numpy(np.stack([row_uniforms(1, Split.TRAIN, i, length) for i in range(rows)]))
    )


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
