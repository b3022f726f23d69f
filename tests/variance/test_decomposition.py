"""Estimates of A, B and C for toy models whose values are known in closed form."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy import stats

from megatron_mdm.objective.samplers import Uniform
from megatron_mdm.variance.decomposition import (
    NestedDraws,
    between_row_variance,
    curve,
    decompose,
    nested_sampler,
)
from megatron_mdm.variance.sketch import Sketch

ROWS, RATES, MASKS = 400, 4, 2
EPS = 1e-3


class Gaussian:
    """Draws c_d x_d + b_d (1 + x_d/2) t + a_d t z_d, with x, z standard normal and t uniform.

    All are independent. Summed over the coordinates d, this gives
        A = sum a^2 E[t^2] = sum a^2 / 3,  B = sum b^2 E[(1 + x/2)^2] / 12 = sum b^2 (5/4) / 12,
        C = sum (c + b/4)^2.
    """

    a, b, c = np.array([[0.9, 0.5, 0.4, 0.7], [1.6, 0.7, 0.9, 1.2], [0.5, 0.4, 0.6, 0.3]])
    truth: ClassVar = {
        "A": (a**2).sum() / 3,
        "B": (b**2).sum() * 5 / 48,
        "C": ((c + b / 4) ** 2).sum(),
    }

    def draws(self, rng, t, masks):
        x = rng.standard_normal((len(t), 1, 1, 4))
        z = rng.standard_normal((*t.shape, masks, 4))
        return self.c * x + t[..., None, None] * (self.b * (1 + x / 2) + self.a * z)


class Binomial:
    """Losses c k / (p L) of rows of L tokens: k ~ Bin(L, p), and no mask changes the loss c.

    A row of a real model has such a loss under Bernoulli masks, with its heavy tail at small p(t):
      A = E[c^2] E[(1 - p) / (p L)] = E[c^2] (log(1/eps) / (1 - eps) - 1) / L,  B = 0,  C = Var[c].
    """

    L, mean, spread = 64, 1.0, 0.3
    second = mean**2 + spread**2
    truth: ClassVar = {
        "A": second * (np.log(1 / EPS) / (1 - EPS) - 1) / L,
        "B": 0.0,
        "C": spread**2,
    }

    def draws(self, rng, t, masks):
        c = self.mean + self.spread * rng.standard_normal((len(t), 1, 1))
        p = ((1 - EPS) * t + EPS)[:, :, None]
        k = rng.binomial(self.L, np.broadcast_to(p, (*t.shape, masks)))
        return (c * k / (p * self.L))[..., None]


TOYS = {"gaussian": Gaussian(), "binomial": Binomial()}
for toy in TOYS.values():
    toy.truth["total"] = sum(toy.truth.values())


def nested(toy, seed, rows=ROWS, rates=RATES, masks=MASKS, sampler=None):
    rng = np.random.default_rng(seed)
    t, w = (sampler or nested_sampler(EPS))(torch.from_numpy(rng.random((rows, rates))))
    return NestedDraws.of_draws(t.numpy(), w.numpy(), toy.draws(rng, t.numpy(), masks))


@pytest.mark.parametrize("name", TOYS)
def test_one_measurement_is_within_three_standard_errors(name):
    result = decompose(nested(TOYS[name], 0, rows=600))
    for part, truth in TOYS[name].truth.items():
        value, error = getattr(result, part)
        assert abs(value - truth) < 3 * error
        assert error < 0.2 * truth or truth == 0


@pytest.mark.slow  # many repetitions
@pytest.mark.parametrize("name", TOYS)
def test_estimates_are_unbiased_and_their_error_bars_cover_as_often_as_they_should(name):
    """Counts 95% intervals in 200 repetitions. With uniform rates alone the binomial toy fails."""
    runs = [decompose(nested(TOYS[name], seed), 200, seed) for seed in range(200)]
    for part, truth in TOYS[name].truth.items():
        values, errors = np.array([getattr(run, part) for run in runs]).T
        assert abs(values.mean() - truth) < 3.5 * values.std(ddof=1) / np.sqrt(len(runs)), part
        inside = int((abs(values - truth) < stats.norm.ppf(0.975) * errors).sum())
        assert stats.binomtest(inside, len(runs), 0.95).pvalue > 0.01, (part, inside)
        assert errors.mean() == pytest.approx(values.std(ddof=1), rel=0.15), part


def test_nested_rates_pay_where_the_weight_has_its_tail():
    """With as many draws of the binomial toy, A is four times as precise, C a bit less precise."""
    toy, spread = TOYS["binomial"], {}
    for name, sampler in (("uniform", Uniform()), ("nested", nested_sampler(EPS))):
        runs = [decompose(nested(toy, s, 100, sampler=sampler), 2, s) for s in range(100)]
        spread[name] = {part: np.std([getattr(run, part)[0] for run in runs]) for part in "AC"}
    assert spread["nested"]["A"] < 0.35 * spread["uniform"]["A"]
    assert spread["nested"]["C"] < 1.4 * spread["uniform"]["C"]


def test_naive_variances_would_be_biased_by_more_than_the_test_can_tell():
    """The corrections matter: without them B would contain A / nm, and C would contain both."""
    rng, toy = np.random.default_rng(0), TOYS["gaussian"]
    cells = toy.draws(rng, rng.random((20000, RATES)), MASKS).mean(axis=2)
    naive = cells.var(axis=1, ddof=1).sum(axis=1).mean()
    assert naive == pytest.approx(toy.truth["B"] + toy.truth["A"] / MASKS, rel=0.05)


def test_a_constant_changes_nothing():
    cells = nested(TOYS["binomial"], 0, rows=50)
    rng = np.random.default_rng(0)
    t, w = nested_sampler(EPS)(torch.from_numpy(rng.random((50, RATES))))
    moved = TOYS["binomial"].draws(rng, t.numpy(), MASKS) + 7.0
    other = decompose(NestedDraws.of_draws(t.numpy(), w.numpy(), moved))
    for part, (value, error) in vars(decompose(cells)).items():
        assert getattr(other, part) == (pytest.approx(value, abs=1e-9), pytest.approx(error))


def test_curves_over_the_rate():
    """A(t) = sum a^2 t^2, and the curve of B is the mean of (b (1 + x/2) (t - 1/2))^2 in a bin."""
    toy = TOYS["gaussian"]
    cells = nested(toy, 1, rows=1000)
    edges = np.linspace(0, 1, 6)
    cubes = np.diff(edges**3) / 3 * 5
    squares = np.diff((edges - 0.5) ** 3) / 3 * 5
    for name, expected in (
        ("pattern", (toy.a**2).sum() * cubes),
        ("rate", (toy.b**2).sum() * 1.25 * squares),
    ):
        points = curve(cells.t, getattr(cells, name), cells.weight, 5)
        for (value, error), truth in zip(points, expected, strict=True):
            assert abs(value - truth) < 4 * error
            assert error < 0.25 * max(expected)
    assert curve(cells.t[:1], cells.t[:1], cells.weight[:1], 5) == [None] * 5


def test_rows_without_rates_and_masks_have_their_variance_only():
    vectors = np.random.default_rng(0).standard_normal((300, 5)).astype(np.float32) + 10
    value, error = between_row_variance(vectors)
    assert value == pytest.approx(vectors.astype(float).var(axis=0, ddof=1).sum(), rel=1e-5)
    assert error == pytest.approx(np.sqrt(2 * 5 / 299), rel=0.2)


def test_sketches_keep_traces():
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (300, 500)]
    vectors = torch.randn(40, 800, generator=generator)

    def trace(sketch):
        def project(vector):
            parts = zip(sketch.parameters, vector.split([300, 500]), strict=True)
            return sketch.gradient(sum((p * v).sum() for p, v in parts))

        return float(torch.stack([project(v) for v in vectors]).var(dim=0).sum())

    exact = trace(Sketch(parameters, None))
    assert exact == pytest.approx(float(vectors.var(dim=0).sum()), rel=1e-5)
    sketched = [trace(Sketch(parameters, 64, seed)) for seed in range(50)]
    error = np.std(sketched, ddof=1) / np.sqrt(50)
    assert abs(np.mean(sketched) - exact) < 4 * error
    assert np.std(sketched) < 0.1 * exact


def test_a_gradient_comes_with_its_norm_at_the_hidden_states():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    unused = torch.nn.Parameter(torch.ones(1))
    hidden = 2 * weight
    sketch = Sketch([weight, unused], None)
    gradient, norm = sketch.gradient_and_norm((hidden**2).sum() / 2, hidden)
    assert gradient.tolist() == [12.0, 16.0, 0.0]
    assert norm == pytest.approx(10.0)


def test_too_few_draws_are_refused():
    with pytest.raises(ValueError, match="3 rates"):
        decompose(nested(TOYS["gaussian"], 0, rates=2))
