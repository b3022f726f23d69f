import numpy as np
import pytest
import torch

from megatron_mdm.objective.control_variate import ControlVariate
from megatron_mdm.objective.samplers import Clipped, PiecewiseSampler, Uniform

BINS = 5
SAMPLERS = {
    "uniform": (Uniform(), ()),
    "ppots": (PiecewiseSampler([0, 0.25, 1], [2.5, 1.2, 7 / 30]), ()),
    "clipped": (Clipped(0.15, 0.7), (0.15, 0.7)),
}


def sums(t, w, loss):
    bins = np.minimum((t * BINS).astype(int), BINS - 1)
    return np.bincount(bins, w * loss, BINS), np.bincount(bins, w, BINS)


def draw(sampler, quantiles):
    t, w = sampler(torch.from_numpy(quantiles))
    return t.numpy(), w.numpy()


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_control_variate_has_mean_zero_under_the_sampler(name):
    sampler, ends = SAMPLERS[name]
    control = ControlVariate(BINS, 0.9, *ends)
    control.baseline = np.array([5.0, 1.0, -2.0, 0.5, 3.0])
    t, w = draw(sampler, (np.arange(1_000_000) + 0.5) / 1_000_000)
    loss = np.sin(7 * t)
    assert control(*sums(t, w, loss), len(t)) == pytest.approx((w * loss).mean(), abs=2e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_it_steadies_the_reported_loss(name):
    sampler, ends = SAMPLERS[name]
    control = ControlVariate(BINS, 0.9, *ends)
    rng = np.random.default_rng(0)
    plain, controlled = [], []
    for _ in range(2000):
        t, w = draw(sampler, rng.uniform(size=16))
        loss = 2.0 + 3.0 * t + 0.1 * rng.standard_normal(16)
        plain.append((w * loss).mean())
        controlled.append(control(*sums(t, w, loss), 16))
    assert np.var(controlled[100:]) < 0.3 * np.var(plain[100:])
    difference = np.array(controlled) - np.array(plain)
    assert abs(difference.mean()) < 4 * difference.std() / len(difference) ** 0.5


def test_the_first_interval_and_a_decay_of_one_are_plain():
    off, on = ControlVariate(BINS, 1.0), ControlVariate(BINS, 0.5)
    first = np.array([1.0, 2.0, 0.0, 4.0, 1.0]), np.array([1.0, 1.0, 0.0, 1.0, 1.0])
    second = np.array([3.0, 2.0, 1.0, 0.0, 0.0]), np.array([2.0, 1.0, 1.0, 0.0, 0.0])
    assert on(*first, 4) == off(*first, 4) == 2.0
    assert off(*second, 4) == 1.5
    # b = (1, 2, 2, 4, 1), the middle one from the mean of all; weights per row (.5 .25 .25 0 0).
    assert on(*second, 4) == pytest.approx(1.5 + 0.2 * 10 - (0.5 + 0.5 + 0.5))
    assert on.baseline == pytest.approx([1.25, 2.0, 1.5, 4.0, 1.0])
