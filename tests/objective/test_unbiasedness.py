"""Every combination of sampler and mask has the exact objective, by enumeration and quadrature."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch

from megatron_mdm.objective.bells import Bell
from megatron_mdm.objective.corruption import Corrupter
from megatron_mdm.objective.loss import row_losses
from megatron_mdm.objective.masks import syrm
from megatron_mdm.objective.randomness import GRID_BITS
from megatron_mdm.objective.reference import (
    density_coefficients,
    expected_coefficients,
    objective_coefficients,
    patterns,
)
from megatron_mdm.objective.samplers import (
    Clipped,
    Flat,
    PiecewiseSampler,
    Tables,
    Uniform,
    count_weight,
    cumulated,
)
from megatron_mdm.objective.views import view_uniforms
from tests import ROOT

EPS = 0.05
MASK_ID = 99
ROWS = [[True, True, True, True], [True, False, True, True], [False, False, True, False]]
FITTED = PiecewiseSampler([0.0, 0.1, 0.4, 1.0], np.array([4.0, 1.5, 0.8, 0.4]) / 0.98)
SAMPLERS = {"uniform": Uniform(), "ppots": FITTED}
ISAD = {"isad_token_ids": (0, 2), "isad_delta": 0.3}
# Settings of the masks. ISAD raises the masking probability of the chosen tokens.
MASKS = {
    "bernoulli": {"mask_kind": "bernoulli"},
    "exact-count": {"mask_kind": "exact-count"},
    "isad exact": {"mask_kind": "bernoulli", **ISAD, "isad_weight": "exact"},
}
# Exact counts with the importance weight of the count, as in blocks.
COUNTS = {"weighted counts": {"mask_kind": "exact-count", "count_weight": True}}


def estimator(eligible, sampler, view, **settings):
    """A draw of the code under test: a function from (u, quantile) to (mask, weight of each CE)."""
    tokens = torch.arange(len(eligible))[None]
    eligible = torch.tensor([eligible])
    if settings.get("count_weight"):
        settings["count_weight"] = partial(count_weight, sampler)
    corrupter = Corrupter(sampler=sampler, mask_token_id=MASK_ID, eps=EPS, **settings)

    def draw(u, quantile):
        grid = view_uniforms((u * 2**GRID_BITS).astype(np.int64), *view)
        corruption = corrupter(
            tokens,
            eligible,
            torch.from_numpy(grid)[None],
            torch.tensor([int(quantile * 2**GRID_BITS)]),
        )
        assert torch.equal(corruption.tokens == MASK_ID, corruption.mask)
        cross_entropy = torch.ones(1, len(u), dtype=torch.float64, requires_grad=True)
        losses = row_losses(
            cross_entropy, corruption.mask, corruption.weight, eligible.sum(dim=1), "rows"
        )
        (weight,) = torch.autograd.grad(losses.numerator, cross_entropy)
        return tuple(corruption.mask[0].tolist()), weight[0].numpy()

    return draw


def expectation(eligible, sampler, view, name):
    """Mean coefficients of a combination, and the coefficients of the objective it should have."""
    L, num_eligible = len(eligible), sum(eligible)
    settings = (MASKS | COUNTS)[name]
    if settings["mask_kind"] == "exact-count":
        # The order of frac(u + j/K) also depends on which of the u wrap around.
        cuts = [np.array([1 - view[0] / view[1]] if view[1] > 2 else [])] * L
        rates = [k / num_eligible for k in range(num_eligible + 1)]
        target = objective_coefficients(eligible, eps=0.0)
    else:
        cuts = None
        # The rate at which p + delta reaches (1 + p)/2, the cap of exact ISAD.
        kink = (1 - 2 * 0.3 - EPS) / (1 - EPS)
        rates = [0.0, kink, 1.0] if "isad" in name else [0.0, 1.0]
        target = objective_coefficients(eligible, EPS)

    def thresholds(quantile):
        if cuts is not None:
            return cuts
        p = (1 - EPS) * float(sampler(torch.tensor([quantile]))[0]) + EPS
        raised = min(p + 0.3, (1 + p) / 2) if "isad" in name else p
        return [cut_points(raised if i in (0, 2) else p, view) for i in range(L)]

    breaks = sorted({*sampler.breaks, *(quantile_of(sampler, t) for t in rates)})
    draw = estimator(eligible, sampler, view, **settings)
    mean = expected_coefficients(draw, L, thresholds, breaks, order=12, ranked=cuts is not None)
    return mean, target


def cut_points(p, view):
    """The values of u in (0, 1) at which [view(u) < p] changes."""
    j, views = view
    if views == 2:
        return np.array([1 - p if j else p])
    start = (1 - j / views) % 1.0  # the u that this view maps to 0
    cuts = {start, (start + p) % 1.0} if j else {p}
    return np.array(sorted(c for c in cuts if 0 < c < 1))


def quantile_of(sampler, t):
    """The quantile of rate t, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if float(sampler(torch.tensor([middle], dtype=torch.float64))[0]) < t:
            low = middle
        else:
            high = middle
    return round((low + high) / 2, 15)


@pytest.mark.parametrize("eligible", ROWS)
@pytest.mark.parametrize("view", [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_mean_coefficients_are_the_objectives(sampler, name, view, eligible):
    """Equal coefficients of every CE_i(m) mean an unbiased loss and gradient for any model."""
    if name == "exact-count" and view[1] == 3:
        eligible = eligible[:3]  # six cells per position, each with its orders: three are enough
    mean, target = expectation(eligible, SAMPLERS[sampler], view, name)
    np.testing.assert_allclose(mean, target, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("view", "length"), [((0, 1), 4), ((1, 2), 4), ((2, 3), 3)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_weights_of_counts_leave_the_objective_as_it_is(sampler, view, length):
    mean, target = expectation(ROWS[1][:length], SAMPLERS[sampler], view, "weighted counts")
    np.testing.assert_allclose(mean, target, rtol=0, atol=1e-9)


EDGES, BELL = [0.0, 0.2, 0.5, 0.8, 1.0], np.array([0.3, 1.0, 2.0, 0.8, 0.3]) / 1.11


def small_bell(role, share):
    """A bell of four cells.

    The real table has thousands of cells, each with its own nodes and masks. A small share would
    need more nodes than this test uses.
    """
    edges = np.array(EDGES)
    return Bell(Tables(edges, BELL, cumulated(edges, BELL)), role, share)


DENSITIES = {
    "flat": Flat(),
    "clipped": Clipped(0.3, 0.8),
    "objective": small_bell("objective", 0.3),
    "weight": small_bell("weight", 0.4),
    "proposal": small_bell("proposal", 0.3),
    "faded": small_bell("objective", 1.0),
}


@pytest.mark.parametrize(
    ("name", "eligible"),
    [*itertools.product(["bernoulli", "exact-count"], ROWS), ("weighted counts", ROWS[1])],
)
@pytest.mark.parametrize("density", DENSITIES)
def test_mean_coefficients_under_another_density_are_its_objectives(density, name, eligible):
    """The oracle integrates over t and does not know how a density is sampled or weighted."""
    sampler = DENSITIES[density]
    objective = {
        "flat": lambda t: 2 * t,
        "clipped": lambda t: 2.0 if 0.3 < t < 0.8 else 0.0,
        "objective": lambda t: 0.7 * np.interp(t, EDGES, BELL) + 0.3,
        "weight": lambda t: 0.6 * np.interp(t, EDGES, BELL) + 0.4,
    }.get(density, lambda t: 1.0)
    breaks = [0.0, 0.2, 0.3, 0.5, 0.8, 1.0]
    mean, exact = expectation(eligible, sampler, (0, 1), name)
    target = density_coefficients(eligible, EPS if name == "bernoulli" else 0.0, objective, breaks)
    np.testing.assert_allclose(mean, target, rtol=0, atol=1e-9)
    is_bound = density in ("proposal", "faded")
    assert np.allclose(mean, exact, rtol=0, atol=1e-9) == (is_bound or sum(eligible) == 1)


class Network(torch.nn.Module):
    """Any function of the visible tokens: it gives the cross entropies [L] of the clean tokens."""

    def __init__(self, length):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        self.tokens = torch.nn.Parameter(draw(length + 1, 6))  # the last one is the mask token
        self.positions = torch.nn.Parameter(draw(length, 6))
        self.head = torch.nn.Parameter(draw(6, length))

    def forward(self, mask):
        clean = torch.arange(len(mask))
        x = self.tokens[torch.where(torch.tensor(mask), len(mask), clean)] + self.positions
        x = torch.tanh(x @ x.T / 6) @ x
        return torch.nn.functional.cross_entropy(x @ self.head, clean, reduction="none")


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_loss_and_gradient_of_a_network_are_the_objectives(sampler, name):
    """Checks equal coefficients against the definition: all masks of a network at 40 rates."""
    eligible = [True, False, True, True]
    mean, _ = expectation(eligible, SAMPLERS[sampler], (1, 2), name)
    eps = 0.0 if name == "exact-count" else EPS
    network = Network(4)
    masks = [m for m in patterns(4) if not m[1]]
    number = {m: sum(1 << i for i, masked in enumerate(m) if masked) for m in masks}
    estimated = sum((torch.from_numpy(mean[number[m]]) * network(m)).sum() for m in masks)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    exact = 0.0
    for x, w in zip(nodes, weights, strict=True):
        p = (1 - eps) * (1 + x) / 2 + eps
        for m in masks:
            loss = network(m)[torch.tensor(m)].sum() / p / 3
            exact = exact + w / 2 * p ** sum(m) * (1 - p) ** (3 - sum(m)) * loss
    torch.testing.assert_close(estimated, exact, rtol=1e-9, atol=0)
    parameters = list(network.parameters())
    got, expected = (torch.autograd.grad(value, parameters) for value in (estimated, exact))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_isad_with_inclusion_weights_shifts_the_objective():
    """Each token is predicted equally often as in the objective, but not from the same contexts."""
    eligible = [True, True, True]
    settings = {"mask_kind": "bernoulli", **ISAD, "isad_weight": "inclusion"}
    draw = estimator(eligible, Uniform(), (0, 1), **settings)

    def thresholds(t):
        p = (1 - EPS) * t + EPS
        return [np.array([min(p + 0.3, 1.0) if i in (0, 2) else p]) for i in range(3)]

    kink = (1 - 0.3 - EPS) / (1 - EPS)
    mean = expected_coefficients(draw, 3, thresholds, [0.0, kink, 1.0], order=12)
    target = objective_coefficients(eligible, EPS)
    np.testing.assert_allclose(mean.sum(axis=0), target.sum(axis=0), atol=1e-9)
    assert np.abs(mean - target).max() > 0.01


def moved(mean, target):
    """The fraction of the objective's weight, 1 in all, that is at another (mask, position)."""
    return np.abs(mean - target).sum() / 2


def isad_shift(delta):
    """How far ISAD with inclusion weights moves the objective when one of four tokens is chosen."""
    settings = {"mask_kind": "bernoulli", "isad_token_ids": (0,), "isad_delta": delta}
    draw = estimator([True] * 4, Uniform(), (0, 1), **settings, isad_weight="inclusion")

    def thresholds(t):
        p = (1 - EPS) * t + EPS
        return [np.array([min(p + delta, 1.0) if i == 0 else p]) for i in range(4)]

    kink = (1 - delta - EPS) / (1 - EPS)
    mean = expected_coefficients(draw, 4, thresholds, [0.0, kink, 1.0], order=12)
    return moved(mean, objective_coefficients([True] * 4, EPS))


def density_shift(sampler):
    draw = estimator([True] * 4, sampler, (0, 1), mask_kind="bernoulli")

    def thresholds(quantile):
        t = float(sampler(torch.tensor([quantile], dtype=torch.float64))[0])
        return [np.array([(1 - EPS) * t + EPS])] * 4

    breaks = sorted({*sampler.breaks[::128], 1.0})  # tables of thousands of cells are smooth
    mean = expected_coefficients(draw, 4, thresholds, breaks, order=12)
    return moved(mean, objective_coefficients([True] * 4, EPS))


def syrm_shift(fraction):
    """How far SyRM moves the objective of one prompt token and three response tokens."""
    without, with_prompt = (
        objective_coefficients([eligible, True, True, True], EPS) for eligible in (False, True)
    )
    uniforms = ((np.arange(100) + 0.5) / 100 * 2**GRID_BITS).astype(np.int64)
    share = syrm(np.full(100, 7), (8,), fraction, uniforms).mean()
    assert syrm(np.full(100, 8), (8,), fraction, uniforms).all()  # structural tokens always count
    return moved(share * with_prompt + (1 - share) * without, without)


def test_how_far_the_biased_methods_move_the_objective():
    """Computes the shares in the guide to the objective exactly."""
    assert isad_shift(0.1) == pytest.approx(0.0711, abs=1e-4)
    assert isad_shift(0.3) == pytest.approx(0.1895, abs=1e-4)
    assert density_shift(Clipped(0.3, 0.8)) == pytest.approx(0.1553, abs=1e-4)
    assert density_shift(Clipped(0.0, 1.0)) == pytest.approx(0.0, abs=1e-12)
    assert density_shift(Flat()) == pytest.approx(0.1940, abs=1e-4)
    for role in ("objective", "weight"):
        bell = Bell.of("logit-normal", [0.0, 0.5], role, 0.01)
        assert density_shift(bell) == pytest.approx(0.1860, abs=1e-4)
    assert density_shift(bell.with_share(1.0)) == pytest.approx(0.0, abs=1e-12)
    assert syrm_shift(0.25) == pytest.approx(0.1609, abs=1e-4)
    assert syrm_shift(1.0) == pytest.approx(0.6437, abs=1e-4)
    guide = (ROOT / "megatron_mdm/objective/README.md").read_text(encoding="utf-8")
    for method, share in (
        ("ISAD with inclusion weights, one token chosen, delta 0.1", isad_shift(0.1)),
        ("ISAD with inclusion weights, one token chosen, delta 0.3", isad_shift(0.3)),
        ("`clipped`, rates from 0.3 to 0.8", density_shift(Clipped(0.3, 0.8))),
        ("`flat`", density_shift(Flat())),
        (
            "logit-normal (0, 0.5), uniform share 0.01",
            density_shift(Bell.of("logit-normal", [0.0, 0.5], "objective", 0.01)),
        ),
        ("SyRM with one token of prompt and three of response, fraction 0.25", syrm_shift(0.25)),
    ):
        assert f"| {method} | {share:.0%} |" in guide


def test_exact_count_is_the_limit_of_bernoulli():
    eligible = [True] * 5
    gap = objective_coefficients(eligible, 1e-9) - objective_coefficients(eligible, 0.0)
    assert np.abs(gap).max() < 1e-8


def test_context_free_model_costs_its_entropy():
    """If CE_i = h for every mask, then J = h: the sum of c[m, i] over m and i is 1."""
    for eps in (0.0, EPS):
        assert objective_coefficients([True, True, False], eps).sum() == pytest.approx(1.0)
