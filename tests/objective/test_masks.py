import subprocess
import sys

import numpy as np
import torch
from scipy import stats

from megatron_mdm.objective.masks import bernoulli_mask, exact_count_mask
from megatron_mdm.objective.randomness import Split, row_uniforms, to_unit
from megatron_mdm.objective.rates import masked_count, masking_probability


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
    assert torch.allclose(weight, torch.tensor(1.5, dtype=torch.float64))
    patterns = torch.bincount((mask * torch.tensor([1, 2, 4, 8])).sum(dim=1))
    assert stats.chisquare(patterns[patterns > 0]).pvalue > 0.001
    assert (patterns > 0).sum() == 3


def test_bernoulli_rate_and_weight():
    t = torch.full((4000,), 0.3, dtype=torch.float64)
    eligible = torch.ones(4000, 8, dtype=torch.bool)
    mask, weight = bernoulli_mask(uniforms(4000, 8), eligible, t, 1e-3)
    p = 0.999 * 0.3 + 1e-3
    assert stats.binomtest(int(mask.sum()), mask.numel(), p).pvalue > 0.001
    assert torch.allclose(weight, torch.tensor(1 / p, dtype=torch.float64))


def test_objective_does_not_import_megatron():
    code = (
        "import sys, pkgutil, importlib, megatron_mdm.objective as o\n"
        "for m in pkgutil.iter_modules(o.__path__, o.__name__ + '.'):\n"
        "    importlib.import_module(m.name)\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'megatron']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
