"""A, B and C against a toy model in which they are known in closed form."""

import numpy as np
import pytest
import torch
from scipy import stats

from megatron_mdm.objective.variance import Sketch, curve, decompose, row_moments

# Draw of row x at rate t: c_d x_d + b_d (1 + x_d/2) t + a_d t z_d, with x, z standard normal and t
# uniform, all independent. Then, summed over the coordinates d,
#   A = sum a^2 E[t^2] = sum a^2 / 3,  B = sum b^2 E[(1 + x/2)^2] / 12 = sum b^2 (5/4) / 12,
#   C = sum (c + b/4)^2.
a, b, c = np.array([[0.9, 0.5, 0.4, 0.7], [1.6, 0.7, 0.9, 1.2], [0.5, 0.4, 0.6, 0.3]])
TRUTH = {
    "A": (a**2).sum() / 3,
    "B": (b**2).sum() * 5 / 48,
    "C": ((c + b / 4) ** 2).sum(),
}
TRUTH["total"] = sum(TRUTH.values())
ROWS, RATES, MASKS = 400, 4, 2


def toy(rng, rows=ROWS, rates=RATES, masks=MASKS):
    """Rates [rows, rates] and draws [rows, rates, masks, 4]."""
    x = rng.standard_normal((rows, 1, 1, 4))
    t = rng.random((rows, rates))
    z = rng.standard_normal((rows, rates, masks, 4))
    return t, c * x + t[..., None, None] * (b * (1 + x / 2) + a * z)


def measured(seed, **shape):
    _, draws = toy(np.random.default_rng(seed), **shape)
    return decompose([row_moments(row) for row in draws], draws.shape[2], seed=seed)


def test_one_measurement_is_within_three_standard_errors():
    result = measured(0, rows=600)
    for name, truth in TRUTH.items():
        value, error = getattr(result, name)
        assert abs(value - truth) < 3 * error
        assert error < 0.2 * truth


def test_estimates_are_unbiased_and_their_error_bars_cover_as_often_as_they_should():
    runs = [measured(seed) for seed in range(200)]
    for name, truth in TRUTH.items():
        values, errors = np.array([getattr(run, name) for run in runs]).T
        assert abs(values.mean() - truth) < 3.5 * values.std(ddof=1) / np.sqrt(len(runs))
        inside = int((abs(values - truth) < stats.norm.ppf(0.975) * errors).sum())
        assert stats.binomtest(inside, len(runs), 0.95).pvalue > 0.01, (name, inside)


def test_naive_variances_would_be_biased_by_more_than_the_test_can_tell():
    """The corrections matter: without them B would hold A / nm, and C both."""
    _, draws = toy(np.random.default_rng(0), rows=20000)
    cells = draws.mean(axis=2)
    naive = cells.var(axis=1, ddof=1).sum(axis=1).mean()
    assert naive == pytest.approx(TRUTH["B"] + TRUTH["A"] / MASKS, rel=0.05)


def test_curves_over_the_rate():
    """A(t) = sum a^2 t^2, and the parts of B average (b (1 + x/2) (t - 1/2))^2."""
    t, draws = toy(np.random.default_rng(1), rows=4000)
    rows = [row_moments(row) for row in draws]
    edges = np.linspace(0, 1, 6)
    cubes = np.diff(edges**3) / 3 * 5
    squares = np.diff((edges - 0.5) ** 3) / 3 * 5
    for name, expected in (
        ("pattern", (a**2).sum() * cubes),
        ("rate", (b**2).sum() * 1.25 * squares),
    ):
        points = curve(t, np.stack([getattr(row, name) for row in rows]), 5)
        for (value, error), truth in zip(points, expected, strict=True):
            assert abs(value - truth) < 4 * error
    assert curve(t[:1], t[:1], 5) == [None] * 5


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


def test_too_few_draws_are_refused():
    with pytest.raises(ValueError, match="3 rates"):
        row_moments(np.zeros((2, 2, 1)))
