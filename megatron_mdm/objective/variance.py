"""Where the variance of the loss and of the gradient comes from, and what each method leaves of it.

With l the loss of a row (or, for the gradient, the trace of the covariance in the place of Var),

    Var[l] =  E_{x,t} Var_m[l | x,t]           A  masking pattern
            + E_x Var_t(E_m[l | x,t])          B  masking rate
            + Var_x(E_{t,m}[l | x])            C  data

(arXiv 2511.18159). Nested draws, n0 rows x nt rates x nm masks, all independent, give unbiased
estimates by random-effects analysis of variance: a variance of means also holds the noise of these
means, which is taken off,

    A = mean of s2,   B = mean of V - A / nm,   C = W - mean of V / nt,

s2 the variance of a cell's masks, V of a row's rates' means, W of the rows' means. The estimates of
B and C can come out negative where the truth is small.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from megatron_mdm.objective.corruption import Corrupter, Corruption
from megatron_mdm.objective.randomness import Quantiles, Split, row_uniforms, view_of
from megatron_mdm.objective.samplers import RateSampler

Floats = npt.NDArray[np.float64]
# (clean tokens [B, L], eligible [B, L], their corruption) -> mean loss, gradient [d]
Step = Callable[[torch.Tensor, torch.Tensor, Corruption], tuple[float, torch.Tensor]]
# (tokens [B, L], eligible [B, L]) -> mean next-token loss, gradient [d]
CausalStep = Callable[[torch.Tensor, torch.Tensor], tuple[float, torch.Tensor]]


@dataclass(frozen=True)
class RowMoments:
    """What one row contributes.

    Attributes:
        mean: mean of all draws [d].
        pattern: unbiased estimate of Var_m at each rate [nt]; traces if d > 1.
        rate: unbiased estimate of (E_m at this rate - mean over rates)^2 at each rate [nt]; their
            mean estimates the row's part of B.
    """

    mean: Floats
    pattern: Floats
    rate: Floats


def row_moments(draws: npt.ArrayLike) -> RowMoments:
    """Takes the draws of one row apart.

    Args:
        draws: values [nt, nm, d], nt >= 3 independent uniform rates and nm >= 2 masks at each.
    """
    x = np.asarray(draws, dtype=np.float64)
    nt, nm, _ = x.shape
    if nt < 3 or nm < 2:
        raise ValueError(f"it takes 3 rates of a row and 2 masks of a rate, got {nt} and {nm}")
    cells = x.mean(axis=1)
    mean = cells.mean(axis=0)
    s2 = ((x - cells[:, None]) ** 2).sum(axis=(1, 2)) / (nm - 1)
    distance = ((cells - mean) ** 2).sum(axis=1)
    V = distance.sum() / (nt - 1)
    # Each rate against the mean of the others, less the noise of both.
    others = ((nt - 1) * V - nt / (nt - 1) * distance) / (nt - 2)
    rate = (nt / (nt - 1)) ** 2 * distance - s2 / nm - others / (nt - 1)
    return RowMoments(mean, s2, rate)


@dataclass(frozen=True)
class Decomposition:
    """A, B, C and their sum, each (estimate, standard error)."""

    A: tuple[float, float]
    B: tuple[float, float]
    C: tuple[float, float]
    total: tuple[float, float]


def decompose(
    rows: list[RowMoments], masks: int, repetitions: int = 1000, seed: int = 0
) -> Decomposition:
    """A, B and C from the rows, with bootstrap standard errors over rows.

    The standard errors are right from some hundreds of rows on; at a hundred they are about 5%
    short, as the distribution of a variance has a long tail.

    Args:
        rows: at least 2.
        masks: nm.
        repetitions: of the bootstrap.
        seed: of the bootstrap.
    """
    n0, nt = len(rows), len(rows[0].pattern)
    pattern = np.array([row.pattern.mean() for row in rows])
    rate = np.array([row.rate.mean() for row in rows])
    means = np.stack([row.mean for row in rows])
    means = means - means.mean(axis=0)
    gram = means @ means.T

    def estimates(counts: Floats) -> Floats:
        """A, B, C and their sum, [4, R], each row standing in as often as `counts` [n0, R]."""
        A, B = pattern @ counts / n0, rate @ counts / n0
        # The variance between rows that are drawn with repetition is (n0 - 1)/n0 of the true one.
        W = (np.diag(gram) @ counts - (counts * (gram @ counts)).sum(axis=0) / n0) / (n0 - 1)
        C = W - (B + A / masks) / nt
        return np.stack([A, B, C, A + B + C])

    value = estimates(np.ones((n0, 1)))[:, 0]
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n0, np.full(n0, 1 / n0), size=repetitions).T.astype(np.float64)
    errors = estimates(counts).std(axis=1, ddof=1) * math.sqrt(n0 / (n0 - 1))
    A, B, C, total = ((float(v), float(e)) for v, e in zip(value, errors, strict=True))
    return Decomposition(A, B, C, total)


def curve(t: Floats, values: Floats, num_bins: int) -> list[tuple[float, float] | None]:
    """Means of values over equal bins of t, with standard errors over rows; None: fewer than 2.

    Args:
        t: rates [n0, nt].
        values: at these rates [n0, nt].
        num_bins: number of bins.
    """
    index = np.ceil(t * num_bins) - 1
    points: list[tuple[float, float] | None] = []
    for i in range(num_bins):
        inside = (index == i).astype(np.float64)
        counts = inside.sum(axis=1)
        n = int((counts > 0).sum())
        if n < 2:
            points.append(None)
            continue
        mean = float((inside * values).sum() / counts.sum())
        residual = (inside * (values - mean)).sum(axis=1)
        points.append((mean, math.sqrt((residual**2).sum() * n / (n - 1)) / counts.sum()))
    return points


class Sketch:
    """A seeded random projection of gradients that keeps squared lengths in the mean.

    A count sketch: every coordinate goes, with a random sign, into one of d sums. Squared lengths,
    and so traces, are unbiased, with a relative error of at most sqrt(2/d) for one sketch.

    Args:
        parameters: what the gradients belong to.
        size: d; None keeps every coordinate.
        seed: of the projection.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], size: int | None, seed: int = 0):
        self.parameters = parameters
        self.size = size
        generator = torch.Generator().manual_seed(seed)
        self._places: list[tuple[torch.Tensor, torch.Tensor]] = []
        for p in parameters if size is not None else []:
            place = torch.randint(size or 0, (p.numel(),), generator=generator, dtype=torch.int32)
            sign = torch.randint(2, (p.numel(),), generator=generator, dtype=torch.int8) * 2 - 1
            self._places.append((place.to(p.device), sign.to(p.device)))

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """The (projected) gradient of a scalar, float32 [d], on the CPU."""
        return self._project(gradients(loss, self.parameters)).cpu()

    def _project(self, parts: list[torch.Tensor]) -> torch.Tensor:
        if self.size is None:
            return torch.cat([g.flatten().float() for g in parts]) if parts else torch.zeros(0)
        result = torch.zeros(self.size, device=parts[0].device if parts else None)
        for g, (place, sign) in zip(parts, self._places, strict=True):
            result.index_add_(0, place, g.flatten().float() * sign)
        return result


def gradients(loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Gradients of a scalar; zeros for parameters that it does not depend on."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@dataclass(frozen=True)
class Method:
    """A way to draw the rates and masks of a batch.

    Attributes:
        quantiles: kind of `Quantiles`.
        mask: kind of mask.
        views: rows made of one text.
        target: what a fitted density of t was measured on, None for the uniform.
        rows: rows in a batch, in multiples of that of `standard`.
        per: what is equal to `standard`: rows or texts.
    """

    quantiles: Literal["iid", "strata", "lattice"] = "iid"
    mask: Literal["bernoulli", "exact-count"] = "bernoulli"
    views: int = 1
    target: str | None = None
    rows: int = 1
    per: str = "row"


METHODS = {
    "standard": Method(),
    "strata": Method(quantiles="strata"),
    "lattice": Method(quantiles="lattice"),
    "exact count": Method(mask="exact-count"),
    "mirror": Method(views=2),
    "mirror (texts)": Method(views=2, rows=2, per="text"),
    "p-pots loss": Method(target="loss"),
    "p-pots gradient": Method(target="gradient"),
    "p-pots loss + mirror": Method(target="loss", views=2),
    "lattice + exact count": Method(quantiles="lattice", mask="exact-count"),
    "p-pots gradient + lattice + exact count": Method(
        quantiles="lattice", mask="exact-count", target="gradient"
    ),
}


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
    """Endless batches of a method, of texts chosen with repetition; numbered as in training.

    Args:
        texts: int64 [N, L].
        eligible: bool [N, L].
        method: the method.
        sampler: density of t.
        mask_token_id: id put at masked positions.
        eps: least masking probability.
        batch: rows of `standard` in a batch.
        seed: of texts, rates and masks.

    Yields:
        (tokens [B, L], eligible [B, L], their corruption).
    """
    texts_in_batch = batch * method.rows // method.views
    strata = max(1, round(math.sqrt(texts_in_batch)))
    quantiles = Quantiles(method.quantiles, seed, Split.TRAIN, texts_in_batch, strata)
    corrupter = Corrupter(sampler, method.mask, mask_token_id, eps)
    choice = torch.Generator().manual_seed(seed)
    number = 0
    while True:
        draws = range(number, number + texts_in_batch)
        number += texts_in_batch
        chosen = torch.randint(len(texts), (texts_in_batch,), generator=choice)
        chosen = chosen.repeat_interleave(method.views)
        uniforms = [
            view_of(row_uniforms(seed, Split.TRAIN, draw, texts.shape[1]), view, method.views)
            for draw in draws
            for view in range(method.views)
        ]
        quantile = torch.tensor([quantiles(d) for d in draws]).repeat_interleave(method.views)
        rows, able = texts[chosen], eligible[chosen]
        yield rows, able, corrupter(rows, able, torch.from_numpy(np.stack(uniforms)), quantile)


@dataclass(frozen=True)
class MethodVariance:
    """How a method's batches scatter, and what they cost.

    Attributes:
        gradient: squared distance of each batch's gradient from their mean, times R/(R - 1), [R]:
            its mean is the trace of the covariance, unbiased.
        loss: the same of the batch's loss [R].
        masked_fraction: share of the positions that are masked, and so go through the head.
    """

    gradient: Floats
    loss: Floats
    masked_fraction: float


def method_variance(
    step: Step, source: Iterator[tuple[torch.Tensor, torch.Tensor, Corruption]], draws: int
) -> MethodVariance:
    """Draws batches of a method and measures their scatter."""
    gradients, losses, masked = [], [], 0.0
    for _ in range(draws):
        tokens, eligible, corruption = next(source)
        loss, gradient = step(tokens, eligible, corruption)
        gradients.append(gradient)
        losses.append(loss)
        masked += float(corruption.mask.double().mean()) / draws
    values = torch.tensor(losses, dtype=torch.float64)[:, None]
    return MethodVariance(scatter(torch.stack(gradients)), scatter(values), masked)


def scatter(values: torch.Tensor) -> Floats:
    """Squared distance of each row of [R, n] from their mean, times R/(R - 1), float64 [R]."""
    R = len(values)
    distances: Floats = (values - values.mean(dim=0)).square().sum(dim=1).double().numpy()
    return distances * R / (R - 1)


def mean(values: Floats) -> tuple[float, float]:
    """Mean of [R] and its standard error."""
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))


def ratio(measured: Floats, baseline: Floats) -> tuple[float, float]:
    """Ratio of two means over the same batches [R], and its standard error to first order.

    Batch i of every method has the same texts and random numbers, so both means go up and down
    together: the error is that of the difference of their parts.
    """
    quotient = float(measured.mean() / baseline.mean())
    parts = measured / measured.mean() - baseline / baseline.mean()
    return quotient, quotient * mean(parts)[1]
