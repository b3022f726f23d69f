import numpy as np
import pytest
import torch

from megatron_mdm.objective.bells import Bell
from megatron_mdm.objective.control_variate import ControlVariate, bin_masses
from megatron_mdm.objective.samplers import Clipped, Flat, PiecewiseSampler, Uniform

BINS = 5
SAMPLERS = {
    "uniform": Uniform(),
    "ppots": PiecewiseSampler([0, 0.25, 1], [2.5, 1.2, 7 / 30]),
    "clipped": Clipped(0.15, 0.7),
    "flat": Flat(),
    "bell": Bell.of("logit-normal", [0.3, 0.5], share=0.01),
    "beta": Bell.of("beta", [2.5, 4.0], share=0.2),
    "weight": Bell.of("logit-normal", [0.3, 0.5], "weight", 0.01),
    "proposal": Bell.of("logit-normal", [0.3, 0.5], "proposal", 0.1),
}


def sums(t, w, loss):
    bins = np.minimum((t * BINS).astype(int), BINS - 1)
    return np.bincount(bins, w * loss, BINS), np.bincount(bins, w, BINS)


def draw(sampler, quantiles):
    t, w = sampler(torch.from_numpy(quantiles))
    return t.numpy(), w.numpy()


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_control_variate_has_mean_zero_under_the_sampler(name):
    sampler = SAMPLERS[name]
    control = ControlVariate(BINS, 0.9)
    control.baseline = np.array([5.0, 1.0, -2.0, 0.5, 3.0])
    t, w = draw(sampler, (np.arange(1_000_000) + 0.5) / 1_000_000)
    loss = np.sin(7 * t)
    value = control(*sums(t, w, loss), len(t), bin_masses(sampler, BINS))
    assert value == pytest.approx((w * loss).mean(), abs=2e-5)


def test_it_has_mean_zero_while_a_bell_fades():
    """The iterations of one interval have different shares and different numbers of rows."""
    bell, rows = SAMPLERS["bell"], [100_000, 300_000, 200_000]
    control = ControlVariate(BINS, 0.9)
    control.baseline = np.array([5.0, 1.0, -2.0, 0.5, 3.0])
    draws, shares = [], [0.01, 0.4, 1.0]
    for share, n in zip(shares, rows, strict=True):
        draws.append(draw(bell.with_share(share), (np.arange(n) + 0.5) / n))
    t, w = (np.concatenate(x) for x in zip(*draws, strict=True))
    loss = np.sin(7 * t)
    masses = bin_masses(bell.with_share(np.average(shares, weights=rows)), BINS)
    plain = (w * loss).mean()
    assert control(*sums(t, w, loss), len(t), masses) == pytest.approx(plain, abs=2e-5)
    # Masses with the share at the start or at the end of the interval would give a wrong loss.
    for share in (shares[0], shares[-1]):
        wrong = ControlVariate(BINS, 1.0)
        wrong.baseline = np.array([5.0, 1.0, -2.0, 0.5, 3.0])
        masses = bin_masses(bell.with_share(share), BINS)
        assert abs(wrong(*sums(t, w, loss), len(t), masses) - plain) > 0.1


@pytest.mark.parametrize("name", SAMPLERS)
def test_masses_are_the_mean_weight_in_each_bin(name):
    sampler = SAMPLERS[name]
    t, w = draw(sampler, (np.arange(1_000_000) + 0.5) / 1_000_000)
    for bins in (1, 3, 10):
        masses = bin_masses(sampler, bins)
        index = np.minimum((t * bins).astype(int), bins - 1)
        np.testing.assert_allclose(masses, np.bincount(index, w, bins) / len(t), atol=1e-5)
        assert masses.sum() == pytest.approx(1.0, abs=1e-12)
        if name in ("uniform", "ppots", "proposal"):
            np.testing.assert_allclose(masses, 1 / bins, atol=1e-14)
    np.testing.assert_allclose(bin_masses(Flat(), 4), np.array([1, 3, 5, 7]) / 16, atol=1e-15)


@pytest.mark.parametrize("name", SAMPLERS)
def test_it_steadies_the_reported_loss(name):
    sampler = SAMPLERS[name]
    control, masses = ControlVariate(BINS, 0.9), bin_masses(sampler, BINS)
    rng = np.random.default_rng(0)
    plain, controlled = [], []
    for _ in range(2000):
        t, w = draw(sampler, rng.uniform(size=16))
        loss = 2.0 + 3.0 * t + 0.1 * rng.standard_normal(16)
        plain.append((w * loss).mean())
        controlled.append(control(*sums(t, w, loss), 16, masses))
    assert np.var(controlled[100:]) < 0.3 * np.var(plain[100:])
    difference = np.array(controlled) - np.array(plain)
    assert abs(difference.mean()) < 4 * difference.std() / len(difference) ** 0.5


def test_the_first_interval_and_a_decay_of_one_are_plain():
    off, on, masses = ControlVariate(BINS, 1.0), ControlVariate(BINS, 0.5), np.full(BINS, 0.2)
    first = np.array([1.0, 2.0, 0.0, 4.0, 1.0]), np.array([1.0, 1.0, 0.0, 1.0, 1.0])
    second = np.array([3.0, 2.0, 1.0, 0.0, 0.0]), np.array([2.0, 1.0, 1.0, 0.0, 0.0])
    assert on(*first, 4, masses) == off(*first, 4, masses) == 2.0
    assert off(*second, 4, masses) == 1.5
    # The baseline b is (1, 2, 2, 4, 1); its middle bin is empty and takes the mean of all. The
    # weights per row are (.5 .25 .25 0 0).
    assert on(*second, 4, masses) == pytest.approx(1.5 + 0.2 * 10 - (0.5 + 0.5 + 0.5))
    assert on.baseline == pytest.approx([1.25, 2.0, 1.5, 4.0, 1.0])
