"""Every sampler x mask combination against the exact objective, by enumeration and quadrature."""

import numpy as np
import pytest
import torch

from megatron_mdm.objective.corruption import corrupt
from megatron_mdm.objective.loss import row_losses
from megatron_mdm.objective.randomness import GRID_BITS
from megatron_mdm.objective.reference import (
    expected_coefficients,
    integrate,
    objective_coefficients,
    patterns,
)
from megatron_mdm.objective.samplers import build_sampler

EPS = 0.05
MASK_ID = 99
ROWS = [[True, True, True, True], [True, False, True, True], [False, False, True, False]]


def estimator(eligible, sampler, mask_kind):
    """One draw of the code under test: from (u, quantile) to a mask and the weight of each CE."""
    tokens = torch.arange(len(eligible))[None]
    eligible = torch.tensor([eligible])

    def draw(u, quantile):
        corruption = corrupt(
            tokens,
            eligible,
            torch.from_numpy((u * 2**GRID_BITS).astype(np.int64))[None],
            torch.tensor([int(quantile * 2**GRID_BITS)]),
            sampler=build_sampler(sampler),
            mask_kind=mask_kind,
            mask_token_id=MASK_ID,
            eps=EPS,
        )
        assert torch.equal(corruption.tokens == MASK_ID, corruption.mask)
        cross_entropy = torch.ones(1, len(u), dtype=torch.float64, requires_grad=True)
        losses = row_losses(
            cross_entropy, corruption.mask, corruption.weight, eligible.sum(dim=1), "rows"
        )
        (weight,) = torch.autograd.grad(losses.numerator, cross_entropy)
        return tuple(corruption.mask[0].tolist()), weight[0].numpy()

    return draw


@pytest.mark.parametrize("eligible", ROWS)
@pytest.mark.parametrize("mask_kind", ["bernoulli", "exact-count"])
@pytest.mark.parametrize("sampler", ["uniform"])
def test_mean_coefficients_are_the_objectives(sampler, mask_kind, eligible):
    """Equal coefficients of every CE_i(m): unbiased loss and unbiased gradient for any model."""
    L, num_eligible = len(eligible), sum(eligible)
    if mask_kind == "bernoulli":
        thresholds = [lambda q: [np.array([(1 - EPS) * q + EPS])] * L]
        breaks, target = [0.0, 1.0], objective_coefficients(eligible, EPS)
    else:
        thresholds = [lambda q: [np.array([])] * L]
        breaks = [k / num_eligible for k in range(num_eligible + 1)]
        target = objective_coefficients(eligible, eps=0.0)
    mean = expected_coefficients(
        estimator(eligible, sampler, mask_kind), L, thresholds[0], breaks, order=8
    )
    np.testing.assert_allclose(mean, target, rtol=0, atol=1e-12)


def test_the_oracle_agrees_with_its_own_definition():
    """The oracle's closed form against direct enumeration of masks and quadrature over t."""
    eligible = [True, False, True, True]
    direct = np.zeros((16, 4))
    for n, mask in enumerate(patterns(4)):
        if mask[1]:
            continue
        k = sum(mask)
        for i in range(4):
            if mask[i]:

                def integrand(t, k=k):
                    p = (1 - EPS) * t + EPS
                    return p**k * (1 - p) ** (3 - k) / p / 3

                direct[n, i] = integrate(integrand, 0.0, 1.0)
    np.testing.assert_allclose(objective_coefficients(eligible, EPS), direct, atol=1e-14)


def test_exact_count_is_the_limit_of_bernoulli():
    eligible = [True] * 5
    gap = objective_coefficients(eligible, 1e-9) - objective_coefficients(eligible, 0.0)
    assert np.abs(gap).max() < 1e-8


def test_context_free_model_costs_its_entropy():
    """A model with CE_i = h whatever is masked has J = h: sum_i,m c[m, i] = 1."""
    for eps in (0.0, EPS):
        assert objective_coefficients([True, True, False], eps).sum() == pytest.approx(1.0)


def test_nothing_eligible_and_nothing_masked_count_with_loss_zero():
    cross_entropy = torch.ones(2, 3)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    losses = row_losses(cross_entropy, mask, torch.ones(2), torch.tensor([0, 3]), "rows")
    assert losses.per_row.tolist() == [0.0, 0.0]
    assert losses.denominator == 2
    losses = row_losses(cross_entropy, mask, torch.ones(2), torch.tensor([0, 3]), "tokens")
    assert losses.numerator == 0.0
    assert losses.denominator == 3


@pytest.mark.parametrize("normalization", ["tokens", "rows"])
def test_normalization_over_uneven_splits(normalization):
    """Sums over any split of a batch give the whole batch's loss: the denominators differ."""
    generator = torch.Generator().manual_seed(0)
    ce = torch.rand(6, 8, generator=generator, dtype=torch.float64)
    num_eligible = torch.tensor([8, 1, 5, 3, 8, 2])
    mask = torch.arange(8) < num_eligible[:, None]
    weight = 1 + torch.rand(6, generator=generator, dtype=torch.float64)
    if normalization == "tokens":
        expected = (ce * mask * weight[:, None]).sum() / num_eligible.sum()
    else:
        expected = ((ce * mask * weight[:, None]).sum(1) / num_eligible).mean()
    for sizes in ([6], [1, 5], [2, 2, 2], [4, 1, 1]):
        parts = [
            row_losses(c, m, w, n, normalization)
            for c, m, w, n in zip(
                *(x.split(sizes) for x in (ce, mask, weight, num_eligible)), strict=True
            )
        ]
        total = sum(p.numerator for p in parts) / sum(p.denominator for p in parts)
        assert float(total) == pytest.approx(float(expected), rel=1e-12)
