"""Measured second moments of the loss or its gradient as a function of the rate."""

import numpy as np
import pytest
import torch

from megatron_mdm.errors import UserError
from megatron_mdm.objective.ppots.exact_sums import LIMBS, from_limbs
from megatron_mdm.objective.ppots.moments import RateMoments, accumulate
from megatron_mdm.objective.ppots.state import TABLE_SIZE
from megatron_mdm.objective.samplers import Uniform, mixture
from tests.objective.ppots.measurements import measured, quadrature


def skewed(num_bins=10):
    """A density with an edge at each bin, 30 times as high at 0 as at 1."""
    edges = np.arange(2 * num_bins + 1) / (2 * num_bins)
    return mixture(edges, np.exp(-5 * edges), 0.03)


def test_moments_are_weighted_means_of_right_closed_bins():
    moments = RateMoments(2)
    moments.update([0.1, 0.5, 0.51, 1.0], [1.0, 3.0, 2.0, 4.0], [1.0, 3.0, 1.0, 1.0])
    np.testing.assert_array_equal(moments.counts, [2, 2])
    np.testing.assert_allclose(moments.mean(), [(1 + 9) / 4, 3.0])
    np.testing.assert_allclose(moments.second_moment(), [(1 + 27) / 4, 10.0])
    assert moments.num_bins == 2 and moments.rows == 4 and moments.skipped == 0


def test_bins_without_rows_are_nan():
    moments = RateMoments(3)
    moments.update([0.5], [2.0], [1.0])
    np.testing.assert_array_equal(moments.second_moment(), [np.nan, 4.0, np.nan])


@pytest.mark.parametrize("sampler", [Uniform(), skewed()], ids=["uniform", "skewed"])
def test_importance_weights_give_the_moments_under_the_uniform_exactly(sampler):
    """With quadrature over quantiles instead of draws, the mean of t^4 in each bin is exact."""
    edges = np.arange(11) / 10
    breaks = edges.tolist() if isinstance(sampler, Uniform) else sampler.breaks
    quantile, w = quadrature(breaks)
    t, weight = sampler(quantile)
    moments = RateMoments(10)
    moments.update(t, t**2, weight * w)
    np.testing.assert_allclose(moments.second_moment(), np.diff(edges**5) / 5 * 10, rtol=1e-12)


def test_skewed_rows_measure_what_uniform_rows_do():
    """The two samples differ only by noise: a chi-squared test over the bins, from batches."""

    def value(t, rng):
        return (1 + t) * rng.exponential(size=len(t))

    batches = {
        name: np.array(
            [measured(2000, 10, sampler, value, seed).second_moment() for seed in range(40)]
        )
        for name, sampler in (("uniform", Uniform()), ("skewed", skewed()))
    }
    a, b = batches["uniform"], batches["skewed"]
    z = (a.mean(0) - b.mean(0)) / np.sqrt(a.var(0, ddof=1) / 40 + b.var(0, ddof=1) / 40)
    assert (z**2).sum() < 29.6  # the 0.1% tail of chi-squared with 10 degrees
    # The test has power: without the weights, a steep density inside a bin would be visible.
    steep = mixture([0, 1], [50.0, 1.0], 0.01)
    quantile, w = quadrature(steep.breaks)
    t, weight = steep(quantile)
    plain, corrected = RateMoments(1), RateMoments(1)
    plain.update(t, 1 + t, w)
    corrected.update(t, 1 + t, weight * w)
    assert corrected.second_moment() == pytest.approx(7 / 3, rel=1e-9)
    assert plain.second_moment() < 0.85 * 7 / 3


def test_second_moment_holds_the_variance_between_rows():
    """The moment is g^2 + v, with v over rows AND masks, not only masks (arXiv 2511.18159)."""
    g, between, masks = 3.0, 2.0, 0.5

    def value(t, rng):
        row = g + between * rng.standard_normal(len(t) // 10).repeat(10)
        return row + masks * rng.standard_normal(len(t))

    moments = measured(200_000, 1, Uniform(), value)
    assert moments.second_moment()[0] == pytest.approx(g**2 + between**2 + masks**2, rel=0.02)


@pytest.mark.parametrize(
    ("t", "value", "weight"),
    [
        (0.5, np.nan, 1.0),
        (0.5, np.inf, 1.0),
        (0.5, -np.inf, 1.0),
        (0.5, 1e200, 1.0),  # its square is not finite
        (0.5, 1.0, np.nan),
        (0.5, 1.0, np.inf),
        (0.5, 0.0, np.inf),
        (0.5, 1.0, 0.0),
        (0.5, 1.0, -1.0),
        (np.nan, 1.0, 1.0),
        (0.0, 1.0, 1.0),
        (1.5, 1.0, 1.0),
    ],
)
def test_rows_that_are_not_numbers_are_skipped_and_counted(t, value, weight):
    clean, moments = RateMoments(4), RateMoments(4)
    clean.update([0.1, 0.6], [1.0, 2.0], [1.0, 1.0])
    moments.update([0.1, t, 0.6], [1.0, value, 2.0], [1.0, weight, 1.0])
    np.testing.assert_array_equal(moments.vector()[:-1], clean.vector()[:-1])
    assert moments.skipped == 1


def test_vectors_add_up_over_ranks_and_micro_batches():
    rng = np.random.default_rng(0)
    t, value, weight = 1 - rng.random(60), rng.random(60), 0.5 + rng.random(60)
    value[7] = np.nan
    whole = RateMoments(5)
    whole.update(t, value, weight)
    parts = [
        accumulate(*(torch.from_numpy(x[i : i + 7]) for x in (t, value, weight)), 5)
        for i in range(0, 60, 7)
    ]
    np.testing.assert_array_equal(whole.vector(), from_limbs(sum(parts[::-1])))
    merged = RateMoments.from_vector(from_limbs(sum(parts[:4])))
    merged.add(RateMoments.from_vector(from_limbs(sum(parts[4:]))))
    np.testing.assert_allclose(merged.vector(), whole.vector(), rtol=1e-14)
    assert RateMoments.from_vector(whole.vector()) == whole
    with pytest.raises(ValueError, match="cannot be added"):
        whole.add(RateMoments(6))


def test_accumulate_against_a_loop():
    rng = np.random.default_rng(1)
    t, value, weight = 1 - rng.random(200), rng.standard_normal(200), 0.5 + rng.random(200)
    expected = np.zeros((4, 7))
    for a, b, c in zip(t, value, weight, strict=True):
        expected[:, int(np.ceil(a * 7)) - 1] += [c, c * b, c * b * b, 1]
    got = accumulate(torch.tensor(t), torch.tensor(value), torch.tensor(weight), 7)
    np.testing.assert_allclose(from_limbs(got), [*expected.ravel(), 0], rtol=1e-12, atol=1e-14)


def test_accumulate_sums_low_precision_in_float64_and_without_gradient():
    value = torch.full((3,), 2.0, dtype=torch.bfloat16, requires_grad=True)
    got = accumulate(torch.full((3,), 0.3), value, torch.ones(3), 1)
    assert got.dtype == torch.int64 and not got.requires_grad
    assert from_limbs(got).tolist() == [3.0, 6.0, 12.0, 3.0, 0.0]


def test_nothing_waits_for_the_device():
    """Meta tensors hold no data, so any code that reads a value back to the host raises."""
    x = torch.empty(8, dtype=torch.float64, device="meta")
    assert accumulate(x, x, x, 10).shape == (LIMBS, 41)
    t, weight = skewed()(x)
    assert t.shape == weight.shape == (8,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_without_waiting():
    sampler = skewed()
    quantile = torch.rand(1000, dtype=torch.float64)
    on_gpu = quantile.cuda()
    sampler(on_gpu)  # copies the table to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        t, weight = sampler(on_gpu)
        sums = accumulate(t, t, weight, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(sums.cpu(), accumulate(t.cpu(), t.cpu(), weight.cpu(), 10))
    expected_t, expected_weight = sampler(quantile)
    torch.testing.assert_close(t.cpu(), expected_t, rtol=1e-13, atol=0)
    torch.testing.assert_close(weight.cpu(), expected_weight, rtol=1e-13, atol=0)
    expected = accumulate(expected_t, expected_t, expected_weight, 10)
    np.testing.assert_allclose(from_limbs(sums.cpu()), from_limbs(expected), rtol=1e-12, atol=0)


def test_decay_forgets_rows_but_not_what_was_skipped():
    moments = RateMoments(1)
    moments.update([0.5, 0.5], [1.0, np.nan], [1.0, 1.0])
    moments.decay(0.25)
    moments.update([0.5], [3.0], [1.0])
    assert moments.second_moment()[0] == pytest.approx((0.25 * 1 + 9) / 1.25)
    assert moments.rows == 1.25 and moments.skipped == 1
    for factor in (-0.1, 1.1, np.nan):
        with pytest.raises(UserError, match="decay"):
            moments.decay(factor)


@pytest.mark.parametrize("vector", [np.zeros(4), np.full(5, np.nan), [-1, 0, 0, 0, 0], [[0] * 5]])
def test_bad_vectors_are_refused(vector):
    with pytest.raises(ValueError, match="rate moments"):
        RateMoments.from_vector(vector)


@pytest.mark.parametrize("num_bins", [0, -1, TABLE_SIZE])
def test_bad_numbers_of_bins_are_refused(num_bins):
    with pytest.raises(UserError, match="number of rate bins"):
        RateMoments(num_bins)
