"""For every sampler, the density in the weight is exactly the density that is sampled."""

import decimal
import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from megatron_mdm.errors import UserError
from megatron_mdm.objective.ppots.fit import fit, tabulate
from megatron_mdm.objective.samplers import (
    Clipped,
    PiecewiseSampler,
    Uniform,
    mixture,
)
from tests.objective.ppots.measurements import epr_moment, moments_of, power_moment, quadrature

ALPHA = 0.01  # error probability that the statistical tests of this module share


def random_sampler(seed, cells=40, spread=1.0):
    rng = np.random.default_rng(seed)
    edges = np.concatenate([[0.0], np.sort(rng.random(cells - 1)), [1.0]])
    return mixture(edges, np.exp(spread * rng.standard_normal(cells + 1)), 0.05)


def steep_sampler():
    """A density proportional to (t + 1e-4)^-0.9, which falls by more than three decades."""
    return mixture(*tabulate(lambda t: (t + 1e-4) ** -0.9), 1e-3)


SAMPLERS = {
    "uniform": Uniform,
    "flat": lambda: PiecewiseSampler([0, 1], [1, 1]),
    "nearly flat": lambda: mixture([0, 0.3, 1], [1.0, 1.0 + 1e-14, 1.0 - 1e-15]),
    "falling line": lambda: mixture([0, 1], [20.0, 1.0], 0.01),
    "rising line": lambda: mixture([0, 1], [1.0, 20.0], 0.01),
    "random": lambda: random_sampler(0),
    "jumps": lambda: random_sampler(1, cells=400, spread=2.0),
    "steep": steep_sampler,
    "uniform mixture": lambda: mixture([0, 0.5, 1], [1, 3, 1], 1.0),
    "epr": lambda: fit(moments_of(epr_moment), family="epr").sampler(),
    "power": lambda: fit(moments_of(power_moment), family="power").sampler(),
    "piecewise": lambda: fit(moments_of(power_moment), family="piecewise").sampler(),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_weighted_mean_of_polynomials_is_their_integral(name):
    """E_q[f/q] is the integral of f for degrees 0 (E[weight] = 1) to 6: draws and weights agree."""
    sampler = SAMPLERS[name]()
    quantile, w = quadrature(sampler.breaks)
    t, weight = sampler(quantile)
    for degree in range(7):
        assert float((w * weight * t**degree).sum()) == pytest.approx(
            1 / (degree + 1), rel=0, abs=1e-9
        )


@pytest.mark.parametrize("name", SAMPLERS)
def test_density_is_the_derivative_of_the_distribution_and_one_over_the_weight(name):
    sampler = SAMPLERS[name]()
    t = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, weight = sampler(t)
    torch.testing.assert_close(weight * sampler.density(t), torch.ones_like(t), rtol=1e-9, atol=0)
    edges = torch.tensor(getattr(sampler, "edges", np.array([0.0, 1.0])))
    values = sampler.density(edges)
    integral = float((edges.diff() * (values[1:] + values[:-1]) / 2).sum())
    assert integral == pytest.approx(1.0, rel=0, abs=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_rates_increase_and_stay_in_range(name):
    sampler = SAMPLERS[name]()
    inner = torch.arange(1, 100_000, dtype=torch.float64) / 100_000
    ends = torch.tensor([2.0**-53, 1e-12, 1e-9, 1e-6], dtype=torch.float64)
    quantile = torch.cat([ends, inner, 1 - ends[1:].flip(0), torch.tensor([1 - 2.0**-53])])
    quantile = torch.cat([quantile, torch.tensor(sampler.breaks[1:-1])]).unique()
    # Leaves out breaks that are too close to another quantile to be resolved after rounding.
    quantile = quantile[torch.cat([torch.tensor([True]), quantile.diff() > 1e-13])]
    t, weight = sampler(quantile)
    assert t.dtype == weight.dtype == torch.float64
    assert (t > 0).all() and (t <= 1).all()
    assert (t.diff() > 0).all()
    assert torch.isfinite(weight).all() and (weight > 0).all()
    assert t[0] < 1e-12 and 1 - t[-1] < 1e-12


@pytest.mark.parametrize("name", ["falling line", "random", "steep", "epr", "power", "piecewise"])
def test_draws_follow_the_density(name):
    """A Kolmogorov-Smirnov test against the distribution function, integrated from `density`."""
    sampler = SAMPLERS[name]()
    quantile = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, _ = sampler(quantile)
    grid = np.union1d(np.geomspace(1e-9, 1, 100_000), np.linspace(0, 1, 100_000))
    density = sampler.density(torch.from_numpy(grid)).numpy()
    cdf = np.concatenate([[0], np.cumsum(np.diff(grid) * (density[1:] + density[:-1]) / 2)])
    pvalue = stats.kstest(t.numpy(), lambda x: np.interp(x, grid, cdf)).pvalue
    assert pvalue > ALPHA / 6


@pytest.mark.parametrize("uniform_share", [1e-3, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("fitted", [[1e6, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 1e-300]])
def test_mixture_bounds_the_weight(uniform_share, fitted):
    """The bound holds even where the fitted density is 0, and at the ends of every cell."""
    sampler = mixture([0.0, 0.01, 1.0], fitted, uniform_share)
    ends = torch.tensor([2.0**-53, *sampler.breaks[1:-1], 1 - 2.0**-53])
    _, weight = sampler(torch.cat([ends, quadrature(sampler.breaks)[0]]))
    assert float(weight.max()) <= 1 / uniform_share * (1 + 1e-15)
    assert (sampler.values >= uniform_share).all()


def test_clipped_draws_between_its_ends_with_weight_one():
    sampler = Clipped(0.3, 0.8)
    quantile, w = quadrature(sampler.breaks)
    t, weight = sampler(quantile)
    assert (t > 0.3).all() and (t <= 0.8).all() and (weight == 1).all()
    for degree in range(7):
        mean = (0.8 ** (degree + 1) - 0.3 ** (degree + 1)) / (degree + 1) / 0.5
        assert float((w * t**degree).sum()) == pytest.approx(mean, rel=1e-12)
    t = torch.tensor([0.1, 0.3, 0.5, 0.8, 0.9], dtype=torch.float64)
    assert sampler.density(t).tolist() == [0.0, 0.0, 2.0, 2.0, 0.0]
    t, _ = Clipped(0.0, 1.0)(torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64))
    assert t[0] > 0 and t[1] <= 1


@pytest.mark.parametrize("ends", [(0.5, 0.5), (0.6, 0.2), (-0.1, 1.0), (0.0, 1.1), (0.0, np.nan)])
def test_clipped_refuses_bad_ends(ends):
    with pytest.raises(UserError, match="0 <= low < high <= 1"):
        Clipped(*ends)


@pytest.mark.parametrize("uniform_share", [0.0, -0.1, 1.1, float("nan")])
def test_mixture_refuses_bad_shares(uniform_share):
    with pytest.raises(UserError, match="uniform share"):
        mixture([0, 1], [1, 1], uniform_share)


@pytest.mark.parametrize(
    ("edges", "density", "reason"),
    [
        ([0, 1], [1], "one value for each"),
        ([0], [1], "two or more edges"),
        ([0, 0.5, 0.5, 1], [1, 1, 1, 1], "increase from 0 to 1"),
        ([0.1, 1], [1, 1], "increase from 0 to 1"),
        ([0, 2], [0.5, 0.5], "increase from 0 to 1"),
        ([0, 1], [1, np.nan], "not finite"),
        ([0, np.inf], [1, 1], "not finite"),
        ([0, 1], [2, 0], "not positive"),
        ([0, 0.5, 1], [2, -1, 2], "not positive"),
        ([0, 1], [1, 1.001], "integral is 1.0005, not 1"),
    ],
)
def test_what_is_not_a_density_is_refused(edges, density, reason):
    with pytest.raises(ValueError, match=reason):
        PiecewiseSampler(edges, density)


@pytest.mark.parametrize("density", [[1, -1], [0, 0], [1, np.nan], [1, np.inf]])
def test_mixture_refuses_what_is_not_a_density(density):
    with pytest.raises(ValueError, match="not negative"):
        mixture([0, 1], density)


def test_flat_table_is_the_uniform_bit_for_bit():
    quantile = torch.rand(1000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for got, expected in zip(
        PiecewiseSampler([0, 1], [1, 1])(quantile), Uniform()(quantile), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("ends", [(2 - 2.0**-24, 2.0**-24), (2.0**-24, 2 - 2.0**-24)])
def test_nothing_cancels_in_the_steepest_cell(ends):
    """The density changes by 30 million to one in a cell; t and weight match 60-digit numbers."""
    sampler = PiecewiseSampler([0, 1], ends)
    quantile = torch.tensor([2.0**-k for k in range(1, 54)], dtype=torch.float64)
    quantile = torch.cat([quantile, 1 - quantile])
    t, weight = sampler(quantile)
    with decimal.localcontext(prec=60):
        left, right = (decimal.Decimal(float(x)) for x in sampler.values)
        for u, got_t, got_weight in zip(quantile, t, weight, strict=True):
            below = decimal.Decimal(float(u))
            q = (left * left + 2 * (right - left) * below).sqrt()
            assert float(got_t) == pytest.approx(float(2 * below / (left + q)), rel=1e-12, abs=0)
            assert float(got_weight) == pytest.approx(float(1 / q), rel=1e-12, abs=0)


def test_shape_is_kept():
    t, weight = random_sampler(0)(torch.full((3, 4), 0.5, dtype=torch.float64))
    assert t.shape == weight.shape == (3, 4)


def test_equality_digest_and_pickle():
    sampler, same, other = random_sampler(0), random_sampler(0), random_sampler(3)
    sampler(torch.tensor([0.5], dtype=torch.float64))  # fills its cache of tables per device
    copy = pickle.loads(pickle.dumps(sampler))
    for a, b in itertools.combinations([sampler, same, copy], 2):
        assert a == b and hash(a) == hash(b) and a.digest() == b.digest()
    assert sampler != other and sampler.digest() != other.digest()
    assert sampler != "a sampler"
    quantile = torch.rand(100, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for got, expected in zip(copy(quantile), sampler(quantile), strict=True):
        assert torch.equal(got, expected)


def test_digest_is_stable():
    """A digest names a table in logs and files, so other processes and versions must agree."""
    code = (
        "from megatron_mdm.objective.samplers import PiecewiseSampler\n"
        "print(PiecewiseSampler([0, 1], [1, 1]).digest())"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == PiecewiseSampler([0, 1], [1, 1]).digest() == GOLDEN


GOLDEN = "124fc60dac41dc47baad781dd0007eeb48fafe636020e7aba99bb0ab9611bd9b"


def test_tables_cannot_be_changed():
    sampler = random_sampler(0)
    with pytest.raises(ValueError, match="read-only"):
        sampler.values[0] = 2.0
