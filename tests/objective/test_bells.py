"""Bell-shaped densities: exact sampling for every share and role, close to the analytic density."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit

from megatron_mdm.errors import UserError
from megatron_mdm.objective.bells import Bell, faded_share
from megatron_mdm.objective.samplers import Flat, Uniform

BELLS = [
    ("logit-normal", [0.0, 0.5]),
    ("logit-normal", [-1.0, 0.1]),
    ("logit-normal", [2.0, 3.0]),
    ("beta", [2.0, 5.0]),
    ("beta", [1.0, 3.0]),
]
SHARES = [1e-3, 0.01, 0.1, 0.5, 1 - 1e-9]


def quadrature(breaks):
    """Gauss-Legendre nodes and weights over (0, 1), between breaks that are close together."""
    x, w = np.polynomial.legendre.leggauss(10)
    half = np.diff(breaks)[:, None] / 2
    nodes = np.array(breaks)[:-1, None] + half * (1 + x)
    return torch.from_numpy(nodes.ravel()), torch.from_numpy((half * w).ravel())


def moments(density, breaks):
    """Integrals of density(t) t^k, k = 0 to 6, by quadrature between breaks of the density."""
    t, w = quadrature(breaks)
    return [float((w * density(t) * t**k).sum()) for k in range(7)]


def edges(bell):
    return Bell(bell.tables, "weight", bell.share).breaks


def w_of(bell):
    """The density of the objective, (1 - share) bell + share."""
    return Bell(bell.tables, "objective", bell.share).density


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bell", BELLS, ids=str)
def test_the_mean_under_each_role_is_its_objectives(bell, share):
    """E[weight t^k] is the integral of w t^k, or of t^k for a proposal, which is unbiased."""
    for role in ("objective", "weight", "proposal"):
        sampler = Bell.of(*bell, role, share)
        quantile, weights = quadrature(sampler.breaks)
        t, weight = sampler(quantile)
        got = [float((weights * weight * t**k).sum()) for k in range(7)]
        exact = [1 / (k + 1) for k in range(7)]
        w = moments(w_of(sampler), edges(sampler))
        assert w[0] == pytest.approx(1.0, rel=0, abs=1e-12)
        expected = exact if role == "proposal" else w
        assert got == pytest.approx(expected, rel=0, abs=1e-9)
        drawn = moments(sampler.density, edges(sampler))
        assert [float((weights * t**k).sum()) for k in range(7)] == pytest.approx(drawn, abs=1e-9)
        inner = t < 1 - 1e-6  # where t still resolves its distance from 1
        torch.testing.assert_close(weight[inner], sampler.weight(t)[inner], rtol=1e-9, atol=0)


@pytest.mark.parametrize("role", ["objective", "weight", "proposal"])
@pytest.mark.parametrize("bell", BELLS, ids=str)
def test_with_share_1_every_role_is_the_uniform_bit_for_bit(bell, role):
    sampler, uniform = Bell.of(*bell, role, 0.1).with_share(1.0), Uniform()
    quantile = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for got, expected in zip(sampler(quantile), uniform(quantile), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(sampler.density(quantile), uniform.density(quantile))
    assert torch.equal(sampler.weight(quantile), uniform.weight(quantile))
    assert sampler.breaks == uniform.breaks


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bell", BELLS, ids=str)
def test_rates_increase_and_stay_in_range(bell, share):
    sampler = Bell.of(*bell, share=share)
    inner = torch.arange(1, 100_000, dtype=torch.float64) / 100_000
    ends = torch.tensor([2.0**-52, 1e-12, 1e-9, 1e-6], dtype=torch.float64)
    quantile = torch.cat([ends, inner, 1 - ends.flip(0)])
    t, _ = sampler(quantile)
    assert (t > 0).all() and (t <= 1).all()
    assert (t.diff() > 0).all()
    _, weight = sampler.with_share(share)(quantile)
    assert (weight == 1).all()
    _, weight = Bell.of(*bell, "proposal", share)(quantile)
    assert (weight > 0).all() and float(weight.max()) <= 1 / share * (1 + 1e-15)


@pytest.mark.parametrize("std", [0.2, 0.35, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("mean", [-3.0, -0.3, 0.0, 2.0])
def test_a_logit_normal_is_near_the_analytic_one(mean, std):
    """The density is within 1e-3 of its maximum, tails included, and logits of draws are normal."""
    sampler = Bell.of("logit-normal", [mean, std], share=1e-300)
    logit = np.linspace(-35, 30, 200_001)
    density = stats.norm.pdf(logit, mean, std) / (expit(logit) * expit(-logit))
    got = sampler.density(torch.from_numpy(expit(logit))).numpy()
    assert np.abs(got - density).max() <= 1e-3 * density.max()
    quantile = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    drawn = np.log(t := sampler(quantile)[0].numpy()) - np.log1p(-t)
    assert drawn == pytest.approx(stats.norm.ppf(quantile.numpy(), mean, std), abs=2e-3 * std)


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 5), (1, 4), (1.5, 1), (20, 30), (100, 100)])
def test_a_beta_is_near_the_analytic_one(a, b):
    sampler = Bell.of("beta", [a, b], share=1e-300)
    t = expit(np.linspace(-35, 30, 200_001))
    density = stats.beta.pdf(t, a, b)
    got = sampler.density(torch.from_numpy(t)).numpy()
    assert np.abs(got - density).max() <= 1e-3 * density.max()


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_draws_follow_the_mixture(share):
    sampler = Bell.of("logit-normal", [0.0, 0.5], share=share)
    quantile = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def cdf(t):
        return (1 - share) * stats.norm.cdf(np.log(t) - np.log1p(-t), 0.0, 0.5) + share * t

    assert stats.kstest(sampler(quantile)[0].numpy(), cdf).pvalue > 0.005


def test_flat_has_the_objective_of_density_2t():
    quantile, w = quadrature(Flat().breaks)
    t, weight = Flat()(quantile)
    assert torch.equal(t, quantile) and torch.equal(weight, Flat().weight(t))
    assert (Flat().density(t) == 1).all()
    for k in range(7):
        assert float((w * weight * t**k).sum()) == pytest.approx(2 / (k + 2), rel=1e-12)


@pytest.mark.parametrize(
    ("bell", "reason"),
    [
        (("logit-normal", [0.0, 0.05]), r"STD of --mdm-logit-normal must lie in \[0.1, 3\]"),
        (("logit-normal", [0.0, float("nan")]), "STD of --mdm-logit-normal must lie in"),
        (("logit-normal", [4.0, 1.0]), r"MEAN of --mdm-logit-normal must lie in \[-3, 3\]"),
        (("logit-normal", [4.0]), "--mdm-logit-normal takes MEAN and STD, got 1 numbers"),
        (("beta", [0.5, 2.0]), r"A of --mdm-beta must lie in \[1, 100\], got 0.5"),
        (("beta", [2.0, float("inf")]), "B of --mdm-beta must lie in"),
    ],
)
def test_bells_that_the_table_cannot_hold_are_refused(bell, reason):
    with pytest.raises(UserError, match=reason):
        Bell.of(*bell)


def test_the_share_rises_linearly_between_start_and_end():
    shares = [faded_share(0.2, 4, 8, finished) for finished in (0, 4, 5, 6, 7, 8, 100)]
    assert shares == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert shares[-2:] == [1.0, 1.0]
    assert [faded_share(0.2, 5, 5, finished) for finished in (4, 5, 6)] == [0.2, 1.0, 1.0]
    assert faded_share(0.2, 0, 0, 0) == 1.0
