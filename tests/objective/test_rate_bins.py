"""Second moments of a value per bin of t, from draws of the number of masked tokens."""

import itertools

import numpy as np
import pytest
import torch

from megatron_mdm.objective.ppots.exact_sums import from_limbs
from megatron_mdm.objective.ppots.moments import RateMoments, TextMoments, accumulate
from megatron_mdm.objective.randomness import GRID_BITS
from megatron_mdm.objective.rate_bins import count_weights, mask_for_bins
from megatron_mdm.objective.reference import integrate, patterns

EPS, MASK_ID = 1e-3, 99


def masked(length, bins, places, target="gradient", kind="bernoulli", num_bins=30, seed=0, **more):
    """Rows of eligible tokens 0, 1, ..., masked for the bins at the places, which lie in (0, 1)."""
    rng = np.random.default_rng(seed)
    B = len(bins)
    settings = {"segments": None, "eligible": torch.ones(B, length, dtype=torch.bool), **more}
    return mask_for_bins(
        torch.arange(length).expand(B, length),
        settings["eligible"],
        torch.from_numpy(rng.integers(0, 2**GRID_BITS, (B, length))),
        torch.as_tensor(bins),
        (torch.as_tensor(places) * 2**GRID_BITS).long(),
        settings["segments"],
        num_bins=num_bins,
        mask_kind=kind,
        mask_token_id=MASK_ID,
        eps=EPS,
        target=target,
    )


def second_moment(F, num_eligible, bin_, num_bins, kind):
    """E[value^2 | bin] by enumerating masks and quadrature over t. `F` holds a value per mask."""
    total, low, high = 0.0, bin_ / num_bins, (bin_ + 1) / num_bins
    for mask, value in zip(patterns(num_eligible), F, strict=True):
        k, L = sum(mask), num_eligible

        def bernoulli(t, k=k, L=L, value=value):
            p = (1 - EPS) * t + EPS
            return p**k * (1 - p) ** (L - k) * (value / p) ** 2

        if k and kind == "bernoulli":
            cuts = np.append(low, np.geomspace(low + 1e-3, high, 20))
            pairs = itertools.pairwise(cuts)
            total += sum(integrate(bernoulli, a, b) for a, b in pairs) * num_bins
        elif k:
            of_count = sum(1 for other in patterns(L) if sum(other) == k)
            share = max(0.0, min(k / L, high) - max((k - 1) / L, low)) * num_bins
            total += share / of_count * (L / k * value) ** 2
    return total


@pytest.mark.parametrize("kind", ["bernoulli", "exact-count"])
@pytest.mark.parametrize("num_bins", [1, 3, pytest.param(30, marks=pytest.mark.slow)])
def test_weights_of_counts_give_the_second_moment_of_any_value(kind, num_bins):
    """Compares with an enumeration of all masks, for a value that differs from mask to mask."""
    L = 6
    F = np.random.default_rng(0).random(2**L)
    exact_count = {}
    for k in range(1, L + 1):
        of_k = [F[i] for i, mask in enumerate(patterns(L)) if sum(mask) == k]
        exact_count[k] = np.mean((L / k * np.array(of_k)) ** 2)
    for index in range(num_bins):
        k, omega = count_weights(kind, L, index, num_bins, EPS)
        got = sum(w * exact_count[int(number)] for number, w in zip(k, omega, strict=True))
        expected = second_moment(F, L, index, num_bins, kind)
        assert got == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["bernoulli", "exact-count"])
@pytest.mark.parametrize("target", ["loss", "gradient"])
def test_draws_have_the_weights_of_their_counts(kind, target):
    """A fine grid of places covers the whole distribution, so its mean square is E[value^2]."""
    L, n = 6, 4000
    g = np.random.default_rng(1).random(L)
    F = np.array([np.dot(mask, g) for mask in patterns(L)])
    for index in (0, 11, 29):
        rows = masked(L, np.full(n, index), (np.arange(n) + 0.5) / n, target, kind)
        assert set(rows.t.tolist()) == {(index + 0.5) / 30} and set(rows.rate_weight.tolist()) == {
            1.0
        }
        assert torch.equal(rows.tokens == MASK_ID, rows.mask)
        k = rows.mask.sum(dim=1).numpy()
        assert k.min() > 0
        # The exact mean over all masks of k tokens replaces the mask that was drawn.
        counts = np.array([sum(mask) for mask in patterns(L)])
        squares = np.array([(F[counts == number] ** 2).mean() for number in range(L + 1)])
        got = (rows.weight[:, 0].numpy() ** 2 * squares[k]).mean()
        assert got == pytest.approx(second_moment(F, L, index, 30, kind), rel=3e-3)


def test_segments_are_masked_by_themselves_and_what_is_not_eligible_is_not():
    eligible = torch.tensor([[True] * 3 + [False] + [True] * 4 + [False] * 2] * 2)
    segments = torch.tensor([[0] * 4 + [1] * 4 + [2] * 2] * 2)
    bins = torch.zeros(2, 10, dtype=torch.long)
    bins[:, 1] = 29
    places = torch.full((2, 10), 0.5)
    rows = masked(10, bins, places, eligible=eligible, segments=segments)
    assert not (rows.mask & ~eligible).any()
    assert rows.mask[:, :4].sum(dim=1).tolist() == [1, 1]
    assert rows.mask[:, 4:8].sum(dim=1).tolist() == [4, 4]
    assert (rows.t[:, :2] * 30).tolist() == [[0.5, 29.5]] * 2
    nothing = masked(5, [0], [0.5], eligible=torch.zeros(1, 5, dtype=torch.bool))
    assert not nothing.mask.any() and nothing.weight.isfinite().all()


def measure(L, target, seed, kind="bernoulli", num_rows=10, masks=10):
    """Measures the first of 30 bins with 100 draws from a model whose moments are known.

    A masked token has a gradient whose squared norm has mean 1, or a cross entropy with mean 3.
    Both vary from token to token and from row to row. Gradients of different tokens are orthogonal.

    Returns:
        The estimate and its standard error, both divided by the true second moment.
    """
    rng = np.random.default_rng(seed)
    places = (rng.random() + np.arange(num_rows * masks) * (5**0.5 - 1) / 2) % 1
    rows = masked(L, np.zeros(num_rows * masks, dtype=int), places, target, kind, seed=seed)
    shape = 4 if target == "gradient" else 9
    token = torch.from_numpy(rng.gamma(shape, 1 / shape, (num_rows * masks, L)))
    of_row = torch.from_numpy(rng.gamma(100, 0.01, num_rows).repeat(masks))
    if target == "gradient":
        value = ((rows.mask * token).sum(1) * of_row).sqrt() * rows.weight[:, 0] / L
    else:
        value = (rows.mask * 3 * token).sum(1) * of_row * rows.weight[:, 0] / L
    texts = []
    for i in range(num_rows):
        own = slice(i * masks, (i + 1) * masks)
        sums = accumulate(rows.t[own], value[own], torch.ones(masks), 30)
        texts.append(RateMoments.from_vector(from_limbs(sums)))
    measured = TextMoments(tuple(texts))
    k, omega = count_weights(kind, L, 0, 30, EPS)
    if target == "gradient":
        truth = (omega / k).sum()  # E[sum over the k masked tokens] (1/k)^2
    else:
        truth = (omega * 9 * 1.01 * (1 + 1 / 9 / k)).sum()
    return measured.total.second_moment()[0] / truth, measured.errors()[0] / truth


@pytest.mark.parametrize("L", [32, 1024])
@pytest.mark.parametrize("target", ["loss", "gradient"])
@pytest.mark.parametrize("kind", ["bernoulli", "exact-count"])
def test_100_draws_of_the_first_bin_are_within_a_fifth_at_twice_the_error(L, target, kind):
    """At L = 32, draws of t gave gradient moments off by 0.7, and often by a factor above 2."""
    got = [measure(L, target, seed, kind) for seed in range(100)]
    estimate, error = np.array(got).T
    assert np.median(error) < 0.1 and np.abs(estimate - 1).max() < 0.35
    assert (np.abs(estimate - 1) < 0.2).mean() > 0.95
    assert estimate.mean() == pytest.approx(1, abs=4 * estimate.std() / 100**0.5)
    # The error bars are honest: with ten rows (9 degrees of freedom), 93% lie within two of them.
    assert np.sqrt((error**2).mean()) == pytest.approx(estimate.std(), rel=0.25)
    assert 0.85 < (np.abs(estimate - 1) < 2 * error).mean() < 0.99


def test_errors_need_two_texts():
    one, two = RateMoments(2), RateMoments(2)
    one.update([0.2, 0.3, 0.8], [1.0, 3.0, 2.0], np.ones(3))
    two.update([0.2, 0.3], [2.0, 4.0], np.ones(2))
    np.testing.assert_array_equal(TextMoments((one,)).errors(), [np.nan, np.nan])
    errors = TextMoments((one, two)).errors()
    # The two texts have means 5 and 10; the standard error is half of their difference.
    np.testing.assert_allclose(errors, [2.5, np.nan])
    assert TextMoments((one, two)).total.second_moment()[0] == pytest.approx(7.5)
