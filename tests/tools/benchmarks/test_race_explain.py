"""The rule that distinguishes explanations, on made-up numbers."""

import numpy as np
import pytest

from benchmarks.race.stages import explain
from benchmarks.race.stages.explain import CELLS, Case

NOISE = {1: 0.001, 2: -0.001, 3: 0.002, 4: -0.002}  # noise of each seed, in all cases or in one


def finals(loss):
    """Final losses `loss(objective, sampling, batch, lr)`, with some noise of each seed."""
    return {
        Case(*cell, batch, lr): {
            seed: loss(*cell, batch, lr) + noise * (1 + place) for seed, noise in NOISE.items()
        }
        for place, cell in enumerate(CELLS)
        for batch in (16, 128)
        for lr in (0.1, 0.2)
    }


def variance(objective, sampling, batch, lr):
    return 2.0 + (sampling == "uniform") * 1.6 / batch


def curriculum(objective, sampling, batch, lr):
    return 2.0 + 0.1 * (objective == "bound")


def step_size(objective, sampling, batch, lr):
    """The bound needs the lower learning rate."""
    return 2.0 + 0.1 * (objective == "bound" and lr == 0.2)


def hidden(objective, sampling, batch, lr):
    """At the better learning rates 0.008 of 0.02 remains, which noise hides from a test."""
    return 2.0 + (0.0 if objective == "bell" else 0.02 if lr == 0.2 else 0.008)


def nothing(objective, sampling, batch, lr):
    return 2.0


@pytest.mark.parametrize(
    "loss, expected",
    [
        (variance, ["variance"]),
        (curriculum, ["curriculum"]),
        (step_size, ["step size"]),
        (hidden, ["curriculum"]),
        (nothing, []),
        (lambda *case: variance(*case) + curriculum(*case), ["variance", "curriculum"]),
        # An effect of sampling that a larger batch does not change is not variance.
        (lambda _, sampling, *rest: 2.0 + 0.1 * (sampling == "uniform"), []),
        # An effect against the bell.
        (lambda *case: 2.0 - curriculum(*case), []),
    ],
)
def test_each_explanation_is_read_where_it_holds(loss, expected):
    assert explain.reading(finals(loss)) == expected


def test_effects_are_of_the_better_rates():
    found = explain.effects(finals(step_size), 16)
    noise = np.array(list(NOISE.values()))
    # The noise in the cells is 1, 2, 3 and 4 times the seed's noise, in their order.
    np.testing.assert_allclose(found.sampling, noise, atol=1e-12)
    np.testing.assert_allclose(found.objective, 2 * noise, atol=1e-12)
    np.testing.assert_allclose(found.tuned, 3 * noise, atol=1e-12)
    np.testing.assert_allclose(found.common[0.2], 3 * noise - 0.1, atol=1e-12)


def test_the_loss_under_the_bells_objective():
    masses = explain.bell_masses(10)
    assert masses.sum() == pytest.approx(1.0)
    # Logit-normal rates of deviation 0.5 have half of their mass on each side, and 0.1587 above one
    # deviation: t = 1 / (1 + exp(-0.5)) = 0.6225.
    np.testing.assert_allclose(masses, masses[::-1])
    assert explain.bell_masses(2)[0] == pytest.approx(0.5)
    top = explain.bell_masses(10_000)[6225:].sum()
    assert top == pytest.approx(0.9 * 0.158655 + 0.1 * 0.3775, abs=1e-4)
    assert explain.bell_loss([3.0] * 10) == pytest.approx(3.0)
    assert explain.bell_loss([0.0, 1.0]) == pytest.approx(0.5)
