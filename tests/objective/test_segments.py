"""Documents of a packed row, each with its own rate, are treated like the same documents alone."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

from megatron_mdm.objective.corruption import Corrupter, Corruption
from megatron_mdm.objective.loss import row_losses
from megatron_mdm.objective.ppots.exact_sums import from_limbs
from megatron_mdm.objective.ppots.moments import accumulate
from megatron_mdm.objective.quantiles import Quantiles
from megatron_mdm.objective.randomness import GRID_BITS, Split, row_uniforms, to_unit
from megatron_mdm.objective.reference import expected_coefficients, objective_coefficients
from megatron_mdm.objective.samplers import PiecewiseSampler, Uniform, count_weight
from megatron_mdm.objective.segments import counts, products, rank_within_segment, totals
from megatron_mdm.objective.views import view_uniforms

MASK_ID = 99
EPS = 0.05
LENGTHS = [[5, 1, 6], [12], [3, 3, 3, 3]]
FITTED = PiecewiseSampler([0.0, 0.1, 0.4, 1.0], np.array([4.0, 1.5, 0.8, 0.4]) / 0.98)
ISAD = {"mask_kind": "bernoulli", "isad_token_ids": (0, 2, 7), "isad_delta": 0.3}
METHODS = {
    "bernoulli": {"mask_kind": "bernoulli"},
    "exact-count": {"mask_kind": "exact-count"},
    "weighted counts": {"mask_kind": "exact-count", "count_weight": partial(count_weight, FITTED)},
    "isad inclusion": {**ISAD, "isad_weight": "inclusion"},
    "isad exact": {**ISAD, "isad_weight": "exact"},
}


def numbers(lengths):
    return torch.tensor([[d for d, n in enumerate(row) for _ in range(n)] for row in lengths])


SEGMENTS = numbers(LENGTHS)


def rows(seed=0):
    """Three packed rows of 12 positions, with all numbers that masking them needs."""
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.from_numpy(np.stack([row_uniforms(1, Split.TRAIN, i, 12) for i in range(3)]))
    quantiles = Quantiles("lattice", seed, Split.TRAIN)
    quantile = torch.from_numpy(np.stack([quantiles.of_documents(i, 12) for i in range(3)]))
    tokens = torch.randint(0, 9, (3, 12), generator=generator)
    eligible = torch.rand(3, 12, generator=generator) < 0.8
    return tokens, eligible, uniforms, quantile


def documents():
    """Yields (row, slice, number) of every document."""
    for row, lengths in enumerate(LENGTHS):
        ends = list(itertools.accumulate(lengths))
        for d, (n, end) in enumerate(zip(lengths, ends, strict=True)):
            yield row, slice(end - n, end), d


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("view", [(0, 1), (1, 2), (2, 3)])
def test_a_document_is_masked_as_it_would_be_alone(name, view):
    tokens, eligible, uniforms, quantile = rows()
    uniforms = torch.from_numpy(np.stack([view_uniforms(u, *view) for u in uniforms.numpy()]))
    corrupter = Corrupter(FITTED, mask_token_id=MASK_ID, eps=EPS, **METHODS[name])
    packed = corrupter(tokens, eligible, uniforms, quantile, SEGMENTS)
    for row, part, d in documents():
        alone = corrupter(
            tokens[row : row + 1, part],
            eligible[row : row + 1, part],
            uniforms[row : row + 1, part],
            quantile[row : row + 1, d],
        )
        assert torch.equal(packed.mask[row, part], alone.mask[0])
        assert torch.equal(packed.tokens[row, part], alone.tokens[0])
        assert packed.t[row, d] == alone.t[0]
        assert packed.rate_weight[row, d] == alone.rate_weight[0]
        assert packed.draw_weight[row, d] == alone.draw_weight[0]
        torch.testing.assert_close(
            packed.weight[row, part],
            alone.weight[0].expand(part.stop - part.start),
            rtol=1e-14,
            atol=0,
        )


@pytest.mark.parametrize("normalization", ["tokens", "rows"])
def test_the_loss_of_a_packed_row_is_that_of_its_documents(normalization):
    tokens, eligible, uniforms, quantile = rows()
    eligible[0, 5] = False  # a document without eligible tokens must not count
    corrupter = Corrupter(FITTED, "exact-count", MASK_ID, EPS)
    ce = torch.rand(3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ce.requires_grad_()
    packed = corrupter(tokens, eligible, uniforms, quantile, SEGMENTS)
    num_eligible = counts(eligible, SEGMENTS)
    losses = row_losses(ce, packed.mask, packed.weight, num_eligible, normalization, SEGMENTS)
    numerator, denominator = 0.0, 0
    for row, part, d in documents():
        one = slice(row, row + 1)
        n = eligible[one, part].sum(dim=1)
        alone = row_losses(
            ce[one, part], packed.mask[one, part], packed.weight[one, part], n, normalization
        )
        assert num_eligible[row, d] == n
        torch.testing.assert_close(losses.per_row[row, d], alone.per_row[0])
        numerator = numerator + alone.numerator
        denominator += int(alone.denominator) if n > 0 else 0
    assert int(losses.denominator) == denominator
    torch.testing.assert_close(losses.numerator, numerator)
    gradients = [torch.autograd.grad(x, ce)[0] for x in (losses.numerator, numerator)]
    torch.testing.assert_close(*gradients, rtol=1e-14, atol=0)


def test_a_row_of_one_document_is_a_row():
    tokens, eligible, uniforms, quantile = rows()
    one = torch.zeros_like(tokens)
    for settings in METHODS.values():
        corrupter = Corrupter(Uniform(), mask_token_id=MASK_ID, eps=EPS, **settings)
        whole = corrupter(tokens, eligible, uniforms, quantile[:, 0])
        single = corrupter(tokens, eligible, uniforms, quantile, one)
        assert torch.equal(whole.mask, single.mask)
        torch.testing.assert_close(whole.weight.expand(3, 12), single.weight, rtol=1e-14, atol=0)


class At(Quantiles):
    """Quantiles that equal the row number."""

    def __call__(self, row):
        return row


@pytest.mark.parametrize("name", ["bernoulli", "exact-count", "weighted counts"])
@pytest.mark.parametrize("sampler", [Uniform(), FITTED], ids=["uniform", "ppots"])
def test_two_documents_are_unbiased(sampler, name):
    """The exact mean over all uniforms and the row's quantile is the objective of each document."""
    lengths = [2, 2]
    segments = numbers([lengths])
    eligible = torch.ones(1, 4, dtype=torch.bool)
    settings = METHODS[name]
    if "count_weight" in settings:
        settings = settings | {"count_weight": partial(count_weight, sampler)}
    exact_count = settings["mask_kind"] == "exact-count"
    corrupter = Corrupter(sampler, mask_token_id=MASK_ID, eps=EPS, **settings)

    def grid(quantile):
        q = At("lattice", 0, Split.TRAIN).of_documents(int(quantile * 2**GRID_BITS), 2)
        return torch.from_numpy(np.concatenate([q, [0, 0]]))[None]

    def draw(u, quantile):
        uniforms = torch.from_numpy((u * 2**GRID_BITS).astype(np.int64))[None]
        c = corrupter(torch.arange(4)[None], eligible, uniforms, grid(quantile), segments)
        ce = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
        losses = row_losses(ce, c.mask, c.weight, counts(eligible, segments), "tokens", segments)
        (weight,) = torch.autograd.grad(losses.numerator / losses.denominator, ce)
        return tuple(c.mask[0].tolist()), weight[0].numpy()

    def thresholds(quantile):
        if exact_count:
            return [np.array([])] * 4
        t = sampler(to_unit(grid(quantile)))[0][0]
        return [np.array([float((1 - EPS) * t[d] + EPS)]) for d in (0, 0, 1, 1)]

    # Quantiles where the rate of either document passes a kink of the density, or one half.
    kinks = [*sampler.breaks, quantile_of_half(sampler)]
    root = np.sqrt(2) - 1
    breaks = sorted({0.0, 1.0, *kinks, *((k - root) % 1 for k in kinks)})
    mean = expected_coefficients(draw, 4, thresholds, breaks, 12, ranked=exact_count)
    target = objective_coefficients([True, True], 0.0 if exact_count else EPS)
    by_pattern = mean.reshape(4, 4, 4)  # patterns of the second and of the first document, position
    for d, own in enumerate((by_pattern.sum(axis=0)[:, :2], by_pattern.sum(axis=1)[:, 2:])):
        np.testing.assert_allclose(own, target / 2, rtol=0, atol=1e-9, err_msg=f"document {d}")


def quantile_of_half(sampler):
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        t = float(sampler(torch.tensor([middle], dtype=torch.float64))[0])
        low, high = (middle, high) if t < 0.5 else (low, middle)
    return low


@pytest.mark.parametrize("kind", ["iid", "lattice", "strata"])
def test_the_quantile_of_every_document_is_uniform(kind):
    quantiles = Quantiles(kind, 3, Split.TRAIN, window=64, strata=8)
    grid = np.stack([quantiles.of_documents(row, 4) for row in range(2000)])
    assert (grid[:, 0] == [quantiles(row) for row in range(2000)]).all()
    for d in range(4):
        assert stats.kstest(to_unit(torch.from_numpy(grid[:, d])).numpy(), "uniform").pvalue > 0.001
    if kind == "iid":
        correlation = np.corrcoef(grid.T.astype(float)) - np.eye(4)
        assert np.abs(correlation).max() < 0.1


def test_rows_and_documents_are_stratified_together():
    """Their discrepancy is far below that of independent rates, in windows of any size."""

    def discrepancy(kind, num_rows, num_documents):
        quantiles = Quantiles(kind, 5, Split.TRAIN)
        rng = np.random.default_rng(0)
        found = []
        for window in range(10):
            sizes = rng.integers(1, 2 * num_documents, num_rows)
            parts = [quantiles.of_documents(100 * window + i, n) for i, n in enumerate(sizes)]
            grid = np.concatenate(parts)
            found.append(stats.kstest(grid / 2**GRID_BITS, "uniform").statistic * len(grid) ** 0.5)
        return np.mean(found)

    for num_rows, num_documents in ((1, 20), (8, 10), (64, 5)):
        lattice = discrepancy("lattice", num_rows, num_documents)
        assert lattice < 0.6 * discrepancy("iid", num_rows, num_documents)


def test_sums_products_and_ranks_of_segments():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3, 12, generator=generator, dtype=torch.float64)
    values[2, 3:6] = 0.5  # equal values keep their order
    sums, powers = totals(values, SEGMENTS), products(values, SEGMENTS)
    places = rank_within_segment(values, SEGMENTS)
    for row, part, d in documents():
        assert float(sums[row, d]) == pytest.approx(float(values[row, part].sum()), rel=1e-14)
        assert float(powers[row, d]) == pytest.approx(float(values[row, part].prod()), rel=1e-14)
        order = values[row, part].argsort(stable=True)
        assert places[row, part][order].tolist() == list(range(len(order)))
    assert sums[1, 1:].tolist() == [0.0] * 11
    # A number that does not occur is a segment without positions.
    gap = totals(values[:1], torch.tensor([[0] * 5 + [3] * 7]))
    assert gap[0, 1:3].tolist() == [0.0, 0.0]
    assert float(gap[0, 3]) == pytest.approx(float(values[0, 5:].sum()), rel=1e-14)


def test_the_largest_weight_is_one_that_multiplies_a_loss():
    mask = torch.tensor([[True, False, False], [False, False, True], [False, False, False]])
    tokens, t = torch.zeros(3, 3, dtype=torch.int64), torch.ones(3, dtype=torch.float64)
    of_rows = torch.tensor([[2.0], [3.0], [9.0]], dtype=torch.float64)
    of_documents = torch.tensor([[2.0, 9.0, 9.0], [9.0, 9.0, 3.0], [9.0] * 3], dtype=torch.float64)
    for weight in (of_rows, of_documents):
        largest = Corruption(tokens, mask, weight, t, t, t).largest_weight
        assert largest.tolist() == [2.0, 3.0, 0.0]


def test_absent_documents_count_nowhere():
    t = torch.tensor([[0.1, 0.6], [0.7, 0.2]], dtype=torch.float64)
    value = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]], dtype=torch.float64)
    present = torch.tensor([[True, True], [True, False]])
    sums = from_limbs(accumulate(t, value, torch.ones_like(t), 2, present))
    assert sums.tolist() == [1, 1, 1, 2, 1, 4, 1, 1, 1]  # one document is skipped, one is absent
