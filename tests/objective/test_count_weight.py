"""The importance weight of a count: mean 1, never of higher variance than that of the rate."""

import numpy as np
import pytest
import torch

from megatron_mdm.objective.bells import Bell
from megatron_mdm.objective.samplers import (
    Clipped,
    Flat,
    PiecewiseSampler,
    Uniform,
    count_weight,
)

SAMPLERS = {
    "uniform": Uniform(),
    "flat": Flat(),
    "clipped": Clipped(0.3, 0.8),
    "ppots": PiecewiseSampler([0.0, 0.1, 0.4, 1.0], np.array([4.0, 1.5, 0.8, 0.4]) / 0.98),
    **{role: Bell.of("beta", [3.0, 2.0], role, 0.2) for role in ("objective", "weight")},
    "proposal": Bell.of("logit-normal", [0.5, 1.0], "proposal", 0.2),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_integrals_of_a_sampler_are_those_of_its_density_and_weight(name):
    sampler = SAMPLERS[name]
    kinks = sampler(torch.tensor(sampler.breaks, dtype=torch.float64))[0].numpy()
    cuts = np.union1d([0.0, 0.2, 0.3, 0.55, 0.8, 1.0], kinks)
    nodes, shares = np.polynomial.legendre.leggauss(4)  # exact between two cuts
    middles, halves = (cuts[1:] + cuts[:-1]) / 2, np.diff(cuts) / 2
    t = torch.from_numpy(middles[:, None] + halves[:, None] * nodes)

    def integrals(values):
        return np.concatenate([[0.0], np.cumsum(halves * (values.numpy() @ shares))])

    drawn, of_objective = sampler.density(t), sampler.density(t) * sampler.weight(t)
    at = torch.from_numpy(cuts)
    np.testing.assert_allclose(sampler.cdf(at), integrals(drawn), rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        sampler.objective_mass(at), integrals(of_objective), rtol=0, atol=1e-12
    )
    quantile = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(sampler.cdf(sampler(quantile)[0]), quantile, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 4, 32])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_weight_of_a_count_never_has_a_higher_variance(name, n):
    sampler = SAMPLERS[name]
    quantile = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t, w = sampler(quantile)
    k = torch.ceil(t * n).long().clamp(1, n)
    of_count = count_weight(sampler, k, torch.full_like(k, n))
    assert float(of_count.mean()) == pytest.approx(1.0, abs=1e-3)
    assert float(w.mean()) == pytest.approx(1.0, abs=1e-3)
    assert of_count.var() <= w.var() * (1 + 1e-6) + 1e-12
    if n == 1:
        assert torch.equal(of_count, torch.ones_like(of_count))


def test_a_weight_for_the_rate_stays_random_in_small_blocks():
    """q = 0.45 t^-1/2 + 0.1: what weighting the count saves at block sizes 1 and 4."""
    edges = np.linspace(0.0, 1.0, 4097) ** 2
    density = 0.45 * np.maximum(edges, edges[1] / 4) ** -0.5 + 0.1
    density /= ((density[1:] + density[:-1]) / 2 * np.diff(edges)).sum()
    sampler = PiecewiseSampler(edges, density)
    t, w = sampler((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    assert float(w.var()) == pytest.approx(0.27, abs=0.005)
    k = torch.ceil(t * 4).long()
    of_count = count_weight(sampler, k, torch.full_like(k, 4))
    # Second moment of the weights of tokens: k of the 4 tokens have the weight w 4 / k.
    moments = [float((x**2 * 4 / k).mean()) for x in (w, of_count)]
    assert moments[0] / moments[1] == pytest.approx(1.08, abs=0.002)


def test_without_eligible_tokens_the_weight_is_1():
    found = count_weight(SAMPLERS["ppots"], torch.tensor([0, 1]), torch.tensor([0, 3]))
    assert found[0] == 1.0
    assert torch.isfinite(found).all()
