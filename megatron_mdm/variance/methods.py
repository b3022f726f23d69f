"""The methods that draw rates and masks, and the variance of a batch under each method.

The loss or gradient of a batch of n texts is the mean of a(t) X over the texts. X is the loss or
gradient of one text at rate t, averaged over its K views. a is the weight of the sampler of t,
which is 1/q(t) for an unbiased method. If the variance were measured on whole batches, the few
batches with a tiny rate would dominate it, because their 1/p outweighs all others. Some hundred
repetitions would not reveal this error. The variance is therefore computed from nested draws, whose
rates come from a suitable density (decomposition.py).

Divide the quantile of t into B equal bins, and let N_b be the number of the batch's quantiles in
bin b. Given the N_b, the texts are independent, so that

    Var = (1/n) (E_q[a^2 |X|^2] - B sum_b |H_b|^2) + (B/n)^2 sum_bb' Cov(N_b, N_b') <H_b, H_b'>,
    H_b = E_q[a X; quantile in bin b].

For iid quantiles this is (E_q[a^2 |X|^2] - |E_q[a X]|^2) / n. Strata and the lattice have a smaller
Cov. Their stratification inside a bin is neglected; its effect is 1/B^2 of the variance that the
rate explains. The products of H are means over pairs of rows. They depend on the kind of mask, but
not on the number of views.

The loss varies around a curve over t that is much larger than its noise. For any f(t), here a cubic
fitted to the draws, E_q[a^2 X^2] = E_q[a^2 (X^2 - f^2)] + E_q[a^2 f^2]. The first term is estimated
from the draws and the second by quadrature. H is split in the same way.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from megatron_mdm import recipes
from megatron_mdm.bound import why_no_bound
from megatron_mdm.config import MDMConfig
from megatron_mdm.densities import fixed_sampler
from megatron_mdm.objective.corruption import Corrupter, Corruption
from megatron_mdm.objective.ppots.fit import Target
from megatron_mdm.objective.quantiles import Quantiles
from megatron_mdm.objective.randomness import GRID_BITS, Split, row_uniforms
from megatron_mdm.objective.samplers import RateSampler
from megatron_mdm.objective.types import Floats
from megatron_mdm.objective.views import view_uniforms
from megatron_mdm.recipes import COMBINATIONS, settings_of
from megatron_mdm.variance.decomposition import NestedDraws, mean_over_row_pairs

QuantileKind = Literal["iid", "strata", "lattice"]
MaskKind = Literal["bernoulli", "exact-count", "isad"]
# (target, kind of mask) -> density fitted to the draws with this kind of mask.
FittedDensities = dict[tuple[Target, str], RateSampler]
BINS = 20  # B
NODES = 100  # quadrature nodes in each bin
WINDOWS = 1000  # number of batches from which Cov(N) is estimated
CURVE_DEGREE = 3
# Methods with a density of t that is neither uniform nor fitted.
DENSITIES = ("proposal", "clipped", "flat", "bell")
QUIET_BELL = "bell+lattice+exact-count"  # the recipe `recommended` before its fade
ISAD_DELTA: float = settings_of("isad")["isad_delta"]


@dataclass(frozen=True)
class Method:
    """A way to draw the rates and masks of a batch.

    Attributes:
        quantiles: kind of `Quantiles`.
        mask: kind of mask; `isad` has Bernoulli masks and inclusion weights.
        views: number of rows (views) made from one text.
        target: the value that the density of t is fitted to; None: the density is not fitted.
        rows: number of rows in a batch, as a multiple of the rows of `standard`.
        density: name of the method in recipes.py that defines the density of t, if it is not
            fitted.
        unbiased: whether the objective is that of `standard`.
        controlled: whether the loss is the controlled loss of the logs (EMA); the gradient is the
            same as without EMA.
    """

    quantiles: QuantileKind = "iid"
    mask: MaskKind = "bernoulli"
    views: int = 1
    target: Target | None = None
    rows: int = 1
    density: str = "standard"
    unbiased: bool = True
    controlled: bool = False

    @property
    def per(self) -> str:
        """`row` if a batch has as many rows as one of `standard`, `text` if as many texts."""
        return "text" if self.rows > 1 else "row"

    @classmethod
    def of(cls, name: str) -> "Method":
        """The method with a name that `recipes.settings_of` knows."""
        settings = settings_of(name)
        is_isad = "isad_delta" in settings
        mdm = MDMConfig(**settings, isad_token_ids=[0] if is_isad else None)
        return cls(
            settings["quantiles"],
            "isad" if is_isad else settings["mask"],
            settings["views"],
            settings.get("ppots_target"),
            density=next(filter(_has_density, COMBINATIONS.get(name, name).split("+")), "standard"),
            unbiased=why_no_bound(mdm, mdm.bell_uniform_share) is None,
            controlled="ema_decay" in settings,
        )

    def sampler(self, fitted: FittedDensities) -> RateSampler:
        """The density of t."""
        if self.target is not None:
            return fitted[self.target, self.mask]
        return fixed_sampler(MDMConfig(**settings_of(self.density)))


def _has_density(part: str) -> bool:
    """Whether a method in recipes.py sets a density of t that is not fitted."""
    return recipes.METHODS[part].get("rate_sampler") not in (None, "ppots")


def _all_methods() -> Iterator[tuple[str, Method]]:
    product = itertools.product(
        ("", "ppots-loss", "ppots-gradient"),
        ("", "strata", "lattice"),
        ("", "exact-count"),
        ("", "mirror"),
    )
    combinations = ["+".join(filter(None, parts)) or "standard" for parts in product]
    for name in [*combinations, "4-views", "isad", *DENSITIES, QUIET_BELL, "ema"]:
        method = Method.of(name)
        yield name, method
        if method.views > 1:
            yield f"{name} (texts)", replace(method, rows=method.views)


METHODS = dict(_all_methods())
# Methods that the reports show by default, in this order.
IMPORTANT = (
    "standard",
    "strata",
    "lattice",
    "exact-count",
    "mirror",
    "mirror (texts)",
    "4-views",
    "4-views (texts)",
    "ppots-loss",
    "ppots-gradient",
    "ppots-loss+mirror",
    "ppots-loss+mirror (texts)",
    "lattice+mirror",
    "lattice+mirror (texts)",
    "exact-count+mirror",
    "exact-count+mirror (texts)",
    "lattice+exact-count",
    COMBINATIONS["ppots"],
    "ema",
    "isad",
    *DENSITIES,
    QUIET_BELL,
)


def choose(words: list[str], isad: bool) -> tuple[str, ...]:
    """Turns method names, `important`, `all` and `none` into method names without duplicates.

    Args:
        words: the words of the command line.
        isad: whether ISAD tokens are given. If not, `important` and `all` do not contain ISAD.
    """
    names: dict[str, None] = {}
    for word in words:
        several = {"important": IMPORTANT, "all": tuple(METHODS), "none": ()}.get(word)
        if several is None:
            names[word] = None
        else:
            names |= dict.fromkeys(n for n in several if isad or METHODS[n].mask != "isad")
    return tuple(names)


def corrupter_of(
    method: Method,
    sampler: RateSampler,
    mask_token_id: int,
    eps: float,
    isad_token_ids: tuple[int, ...] = (),
) -> Corrupter:
    """Makes the corrupter of a method; `isad_token_ids` are the tokens ISAD masks more often."""
    isad = method.mask == "isad"
    return Corrupter(
        sampler,
        "exact-count" if method.mask == "exact-count" else "bernoulli",
        mask_token_id,
        eps,
        isad_token_ids if isad else (),
        ISAD_DELTA,
    )


def batches(
    texts: torch.Tensor,
    eligible: torch.Tensor,
    method: Method,
    sampler: RateSampler,
    mask_token_id: int,
    eps: float,
    batch: int,
    seed: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Corruption]]:
    """Endless batches of a method; texts are drawn with replacement and numbered as in training.

    Args:
        texts: int64 [N, L].
        eligible: bool [N, L].
        method: the method.
        sampler: density of t.
        mask_token_id: token id that replaces masked tokens.
        eps: least masking probability.
        batch: number of rows in a batch of `standard`.
        seed: seed of texts, rates and masks.

    Yields:
        (tokens [B, L], eligible [B, L], the masked rows).
    """
    texts_in_batch = batch * method.rows // method.views
    quantiles = quantiles_of(method.quantiles, texts_in_batch, seed)
    corrupter = corrupter_of(method, sampler, mask_token_id, eps)
    choice = torch.Generator().manual_seed(seed)
    number = 0
    while True:
        draws = range(number, number + texts_in_batch)
        number += texts_in_batch
        chosen = torch.randint(len(texts), (texts_in_batch,), generator=choice)
        chosen = chosen.repeat_interleave(method.views)
        uniforms = [
            view_uniforms(row_uniforms(seed, Split.TRAIN, draw, texts.shape[1]), view, method.views)
            for draw in draws
            for view in range(method.views)
        ]
        quantile = torch.tensor([quantiles(d) for d in draws]).repeat_interleave(method.views)
        rows, able = texts[chosen], eligible[chosen]
        yield rows, able, corrupter(rows, able, torch.from_numpy(np.stack(uniforms)), quantile)


def quantiles_of(kind: QuantileKind, texts: int, seed: int) -> Quantiles:
    """Quantiles for batches of `texts` texts; strata number sqrt(texts), as in the paper's code."""
    return Quantiles(kind, seed, Split.TRAIN, texts, max(1, round(math.sqrt(texts))))


@lru_cache
def bin_covariance(kind: QuantileKind, texts: int, seed: int = 0) -> Floats:
    """Cov(N_b, N_b') [B, B]: covariance of the numbers of a batch's quantiles in equal bins."""
    if kind == "iid":
        covariance: Floats = texts * (np.eye(BINS) / BINS - 1 / BINS**2)
        return covariance
    quantiles = quantiles_of(kind, texts, seed)
    bins = np.array([quantiles(i) * BINS >> GRID_BITS for i in range(WINDOWS * texts)])
    window = np.repeat(np.arange(WINDOWS), texts)
    counts = np.zeros((WINDOWS, BINS))
    np.add.at(counts, (window, bins), 1)
    deviation = counts - texts / BINS
    return deviation.T @ deviation / WINDOWS


@dataclass(frozen=True)
class MethodDraws:
    """Draws of the loss or the gradient with one kind of mask and K views, for `batch_variance`.

    Attributes:
        nested_draws: nested draws of X - f, or of single views, which have the same mean. If X is
            far from 0, like the loss, use the draws that `squares` is made from: they give less
            noise.
        squares: mean of |X|^2 - f^2 over the draws at a rate [n0, nt].
        curve: coefficients of the polynomial f(t), the highest power first; None: f = 0.
        residual: means over masks of X - f [n0, nt]; None: f = 0.
    """

    nested_draws: NestedDraws
    squares: Floats
    curve: Floats | None = None
    residual: Floats | None = None

    @classmethod
    def of_losses(cls, t: Floats, weight: Floats, losses: Floats) -> "MethodDraws":
        """Makes the draws from losses and fits f(t) to them.

        Args:
            t: rates [n0, nt].
            weight: one over the density that the rates were drawn from [n0, nt].
            losses: losses, averaged over the views [n0, nt, nm].
        """
        means = losses.mean(axis=2)
        curve = np.polyfit(t.ravel(), means.ravel(), CURVE_DEGREE, w=np.sqrt(weight.ravel()))
        f = np.polyval(curve, t)
        nested_draws = NestedDraws.of_draws(t, weight, (losses - f[:, :, None])[..., None])
        return cls(nested_draws, (losses**2).mean(axis=2) - f**2, curve, means - f)


def batch_variance(
    method_draws: MethodDraws, sampler: RateSampler, covariance: Floats, texts: int, counts: Floats
) -> Floats:
    """Variance of a batch's loss, or the trace of its gradient's covariance [R].

    Args:
        method_draws: draws of the loss or the gradient.
        sampler: sampler of t.
        covariance: Cov(N_b, N_b') of a batch [B, B].
        texts: number of texts in a batch, n.
        counts: how often each of R samples contains each row of the nested draws [n0, R].
    """
    nested_draws = method_draws.nested_draws
    n0, nt = nested_draws.t.shape
    t = torch.from_numpy(nested_draws.t)
    q, a = sampler.density(t).numpy(), sampler.weight(t).numpy()
    share = nested_draws.weight * q  # weight of each draw in a mean over t ~ q
    square = (share * a**2 * method_draws.squares).mean(axis=1) @ counts / n0
    # t increases with the quantile, so each bin of the quantile is an interval of t.
    inner = torch.arange(1, BINS, dtype=torch.float64) / BINS
    index = np.searchsorted(sampler(inner)[0].numpy(), nested_draws.t.ravel())
    K = (BINS / texts) ** 2 * covariance - BINS / texts * np.eye(BINS)
    factor = (share * a).ravel()
    products = nested_draws.gram * factor[:, None] * factor * K[index][:, index]
    rows = products.reshape(n0, nt, n0, nt).mean(axis=(1, 3))
    curve, residual = method_draws.curve, method_draws.residual
    if curve is not None and residual is not None:
        known_square, known = _integrals(sampler, curve)
        square = square + known_square
        mixed = (factor * residual.ravel() * (K @ known)[index]).reshape(n0, nt).mean(axis=1)
        rows = rows + mixed[:, None] + mixed + known @ K @ known
    variance: Floats = square / texts + mean_over_row_pairs(rows, counts)
    return variance


def _integrals(sampler: RateSampler, curve: Floats) -> tuple[float, Floats]:
    """E_q[a^2 f^2], and E_q[a f] in each bin of the quantile [B]."""
    quantile = (torch.arange(BINS * NODES, dtype=torch.float64) + 0.5) / (BINS * NODES)
    t, a = (x.numpy() for x in sampler(quantile))
    values = a * np.polyval(curve, t)
    return float((values**2).mean()), values.reshape(BINS, NODES).mean(axis=1) / BINS
