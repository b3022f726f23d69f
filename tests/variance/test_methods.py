"""The variance that each method leaves, from nested draws, against the known values of a toy."""

import itertools
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from megatron_mdm.objective.ppots.fit import tabulate
from megatron_mdm.objective.randomness import GRID_BITS
from megatron_mdm.objective.samplers import Clipped, mixture
from megatron_mdm.variance.decomposition import NestedDraws, nested_sampler, resampled, with_error
from megatron_mdm.variance.methods import (
    IMPORTANT,
    METHODS,
    Method,
    MethodDraws,
    batch_variance,
    bin_covariance,
    choose,
    quantiles_of,
)
from tests import ROOT

EPS, L, BATCH = 1e-3, 16, 32
# Coordinate d of X is c_d (1 + SLOPES_d t) k / (p L). Each row has its own c_d ~ N(mean, spread^2),
# and k of its L tokens are masked. Bernoulli masks have the heavy tail of 1/p, which few of a
# hundred batches show. The loss has one coordinate, far from 0; the gradient is mostly noise.
SLOPES = np.array([2.0, -1.0, 0.5])
MEAN_AND_SPREAD = {False: (1.0, 0.3), True: (0.4, 1.0)}
FITTED = mixture(*tabulate(lambda t: ((1 - EPS) * t + EPS) ** -0.5), 0.1)
NAMES = [
    "strata",
    "lattice",
    "exact-count",
    "mirror",
    "mirror (texts)",
    "ppots-loss",
    "ppots-loss+lattice",
    "ppots-loss+mirror (texts)",
    "lattice+exact-count",
    "clipped",
    "flat",
    "bell",
    "proposal",
]


def shape_of(t):
    """The curves g_d(t), [..., 3]."""
    return 1 + SLOPES * t[..., None]


def sampler_of(method):
    return method.sampler({("loss", mask): FITTED for mask in ("bernoulli", "exact-count")})


def counts_of(rng, t, mask, views, masks):
    """k / (p L), averaged over the views, [..., masks]."""
    if mask == "exact-count":
        return np.ones((*t.shape, masks))
    p = ((1 - EPS) * t + EPS)[..., None, None]
    u = rng.random((*t.shape, masks, L))
    return sum((x < p).sum(axis=-1) for x in (u, 1 - u)[:views]) / (p[..., 0] * L * views)


def nested(seed, rows, vector):
    """Draws of the toy under both kinds of masks, with one and two views."""
    rng = np.random.default_rng(seed)
    t, w = (x.numpy() for x in nested_sampler(EPS)(torch.from_numpy(rng.random((rows, 4)))))
    mean, spread = MEAN_AND_SPREAD[vector]
    c = mean + spread * rng.standard_normal((rows, 1, 1, 3))
    found = {}
    for mask in ("bernoulli", "exact-count"):
        share = {k: counts_of(rng, t, mask, k, 2)[..., None] for k in (1, 2)}
        x = {k: c * shape_of(t)[:, :, None] * share[k] for k in share}
        if vector:
            single = NestedDraws.of_draws(t, w, x[1])
            found |= {(mask, k): MethodDraws(single, (y**2).sum(3).mean(2)) for k, y in x.items()}
        else:
            found |= {(mask, k): MethodDraws.of_losses(t, w, y[..., 0]) for k, y in x.items()}
    return found


def truth(method, vector, batches=20000):
    """The exact variance of a batch, from drawn batches of rates; texts and masks in closed form.

    Var_m of k / (p L) is (1 - p) / (p L). The covariance of two mirrored views is -1 / L up to p =
    1/2, and -((1 - p) / p)^2 / L above.
    """
    texts = BATCH * method.rows // method.views
    quantiles = quantiles_of(method.quantiles, texts, seed=5)
    rng = np.random.default_rng(0)
    unit = rng.random((batches, texts))
    if method.quantiles != "iid":
        unit = np.array([quantiles(i) for i in range(batches * texts)]).reshape(unit.shape)
        unit = (unit + 0.5) * 2.0**-GRID_BITS
    t, a = (x.numpy() for x in sampler_of(method)(torch.from_numpy(unit)))
    p = (1 - EPS) * t + EPS
    noise = np.zeros_like(p)
    if method.mask == "bernoulli":
        noise = (1 - p) / p / L
        if method.views == 2:
            noise = (noise - np.minimum(1.0, (1 - p) / p) ** 2 / L) / 2
    g = shape_of(t) if vector else shape_of(t)[..., :1]
    mean, spread = MEAN_AND_SPREAD[vector]
    within = a**2 * (g**2).sum(axis=-1) * ((mean**2 + spread**2) * (1 + noise) - mean**2)
    between = mean**2 * (a[..., None] * g).mean(axis=1).var(axis=0).sum()
    return within.sum(axis=1).mean() / texts**2 + between


def found(drawn, method, counts):
    texts = BATCH * method.rows // method.views
    covariance = bin_covariance(method.quantiles, texts)
    source = drawn[method.mask, method.views]
    return batch_variance(source, sampler_of(method), covariance, texts, counts)


@pytest.mark.slow  # many repetitions
@pytest.mark.parametrize("vector", [False, True], ids=["loss", "gradient"])
def test_ratios_are_right_and_their_error_bars_honest(vector):
    """Checks 80 repetitions with 200 rows each, in spite of the tail of 1/p."""
    rows, repetitions = 200, 80
    standard = truth(METHODS["standard"], vector)
    runs = {name: [] for name in NAMES}
    for seed in range(repetitions):
        drawn, counts = nested(seed, rows, vector), resampled(rows, 100, seed)
        baseline = found(drawn, METHODS["standard"], counts)
        for name in NAMES:
            runs[name].append(with_error(found(drawn, METHODS[name], counts) / baseline, rows))
    for name in NAMES:
        ratio, error = np.array(runs[name]).T
        exact = truth(METHODS[name], vector) / standard
        spread = ratio.std(ddof=1)
        assert abs(ratio.mean() - exact) < 0.02 * exact + 4 * spread / repetitions**0.5, name
        inside = int((abs(ratio - exact) < 1.96 * error).sum())
        assert stats.binomtest(inside, repetitions, 0.95).pvalue > 1e-3, (name, inside)
        # For a method that changes almost nothing, a paired bootstrap gives up to 2% too much.
        assert 0.75 * spread < error.mean() < 1.25 * spread + 0.02, name
        assert spread < 0.2 * exact, name


def test_quantiles_fall_into_bins_as_they_do_in_batches():
    iid, strata, lattice = (bin_covariance(kind, 32) for kind in ("iid", "strata", "lattice"))
    for covariance in (iid, strata, lattice):
        np.testing.assert_allclose(covariance.sum(axis=1), 0, atol=1e-9)
    counts = np.random.default_rng(0).multinomial(32, [1 / len(iid)] * len(iid), size=200000)
    np.testing.assert_allclose(iid, np.cov(counts.T, ddof=0), atol=0.05)
    # A batch mean of a smooth function of the quantile, over batches of other seeds, has the
    # variance that the covariance predicts. Strata and lattice both remove nine tenths of the
    # variance of iid.
    middles = (np.arange(len(iid)) + 0.5) / len(iid)
    for kind, covariance, tolerance in (("strata", strata, 0.15), ("lattice", lattice, 0.03)):
        quantiles = quantiles_of(kind, 32, seed=5)
        drawn = np.array([quantiles(i) for i in range(2000 * 32)]) * 2.0**-GRID_BITS
        variance = drawn.reshape(-1, 32).mean(axis=1).var()
        assert variance == pytest.approx(middles @ covariance @ middles / 32**2, rel=tolerance)
        assert variance < 0.1 * middles @ iid @ middles / 32**2


def test_names_say_what_methods_are():
    assert METHODS["standard"] == Method()
    assert METHODS["mirror (texts)"] == Method(views=2, rows=2)
    assert METHODS["ppots-loss+mirror"] == Method(target="loss", views=2)
    assert METHODS["ppots-gradient+lattice+exact-count"] == Method(
        quantiles="lattice", mask="exact-count", target="gradient"
    )
    product = itertools.product(
        ("iid", "strata", "lattice"),
        ("bernoulli", "exact-count"),
        (1, 2),
        (None, "loss", "gradient"),
    )
    assert {Method(*parts) for parts in product} <= set(METHODS.values())
    names = {method: name for name, method in METHODS.items()}
    assert len(names) == len(METHODS)
    # Every method with several views is listed at equal rows and at equal texts.
    for name, method in METHODS.items():
        assert method.per == ("text" if name.endswith(" (texts)") else "row")
        if method.views > 1:
            other = Method(**{**vars(method), "rows": method.views if method.rows == 1 else 1})
            assert (name in IMPORTANT) == (names[other] in IMPORTANT)
    biased = [name for name, method in METHODS.items() if not method.unbiased]
    assert biased == ["isad", "clipped", "flat", "bell", "bell+lattice+exact-count"]


def test_densities_are_those_that_the_recipes_name():
    t = (torch.arange(9, dtype=torch.float64) + 0.5) / 9
    for name, method in METHODS.items():
        if method.target is None:
            sampler, objective = method.sampler({}), torch.ones_like(t)
            if name == "clipped":
                objective = Clipped(0.3, 0.8).density(t)
            if name == "flat":
                objective = 2 * t
            if method.density == "bell":
                objective = sampler.density(t)
                assert objective.max() > 1.5 and objective.min() < 0.05
            if name == "proposal":
                assert sampler.density(t).max() > 1.5 and sampler.density(t).min() > 0.1
            torch.testing.assert_close(sampler.density(t) * sampler.weight(t), objective)
    assert Method.of("ppots") == METHODS["ppots-gradient+lattice+exact-count"]
    before_its_fade = METHODS["bell+lattice+exact-count"]
    assert Method.of("recommended") == replace(before_its_fade, density="bell-late")
    for name in ("bell-fade", "lattice+bell"):  # for a density that fades, the first one
        assert Method.of(name).density == name.split("+")[-1] and not Method.of(name).unbiased


def test_methods_are_chosen_by_name_or_together():
    assert choose(["none"], isad=True) == ()
    assert choose(["mirror", "important"], isad=True)[:2] == ("mirror", "standard")
    assert set(choose(["all"], isad=True)) == set(METHODS)
    assert set(METHODS) - set(choose(["all"], isad=False)) == {"isad"}
    assert choose(["isad"], isad=False) == ("isad",)


def test_methods_of_every_example_exist():
    """Checks the commands in README.md, in the guides and in the help of the tools."""
    files = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
    for folder, suffix in (("tools", "py"), ("tools", "md"), ("megatron_mdm", "md")):
        files += (ROOT / folder).rglob(f"*.{suffix}")
    found = [
        (path, shlex.split(words.split(" --")[0]))
        for path in files
        for words in re.findall(r'--methods ([^`"\n]+)', path.read_text(encoding="utf-8"))
    ]
    named = {path.relative_to(ROOT).as_posix() for path, _ in found}
    assert {"megatron_mdm/variance/README.md", "tools/variance_report.py"} <= named
    for path, words in found:
        assert words and set(choose(words, isad=True)) <= set(METHODS), (path, words)
