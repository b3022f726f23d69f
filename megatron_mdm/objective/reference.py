"""A slow float64 oracle of the objective: enumerates every mask and integrates over t.

Let CE_i(m) be the cross entropy that a model gives at position i when the positions in m are
masked. The loss is linear in these cross entropies, so the coefficients c define the objective:

    J = sum over masks m and positions i of  c[m, i] CE_i(m).

An estimator whose coefficients have the mean c is unbiased for the loss AND for its gradient,
whatever the model. This module uses only textbook probability and does not import the code that it
checks. Masks (patterns) are numbered by their bits: bit i is set if position i is masked.
"""

import itertools
from collections.abc import Callable
from math import comb

import numpy as np

from megatron_mdm.objective.types import Floats


def patterns(length: int) -> list[tuple[bool, ...]]:
    """All 2^length masks; pattern number n has bit i set where position i is masked."""
    return [tuple(bool(n >> i & 1) for i in range(length)) for n in range(2**length)]


def objective_coefficients(eligible: list[bool], eps: float) -> Floats:
    """c[m, i] of J = E_t E_m [(1/L_e) sum_i m_i CE_i / p(t)] for one row (method of LLaDA).

    Args:
        eligible: which positions may be masked [L].
        eps: p(t) = (1 - eps) t + eps. eps = 0 gives the objective of exact-count masks, the limit
            eps -> 0: every count k = 1..L_e is equally likely and has the weight L_e/k.

    Returns:
        float64 [2^L, L]; all 0 if nothing is eligible.
    """
    num_eligible = sum(eligible)
    return _coefficients(eligible, lambda k: _mean_over_p(k, num_eligible, eps) / num_eligible)


def density_coefficients(
    eligible: list[bool], eps: float, density: Callable[[float], float], breaks: list[float]
) -> Floats:
    """c[m, i] of J = integral of density(t) E_m [(1/L_e) sum_i m_i CE_i / p(t)], for one row.

    Args:
        eligible: which positions may be masked [L].
        eps: p(t) = (1 - eps) t + eps; 0: exact counts k = ceil(t L_e), weighted by L_e/k. If the
            density is not 1, exact counts have another objective than Bernoulli masks with eps
            -> 0.
        density: density of the objective.
        breaks: rates from 0 to 1; between them the density is a polynomial.

    Returns:
        float64 [2^L, L]; all 0 if nothing is eligible.
    """
    num_eligible = sum(eligible)

    def integral(f: Callable[[float], float], low: float, high: float) -> float:
        cuts = [low, *(x for x in breaks if low < x < high), high]
        return sum(
            integrate(lambda t: density(t) * f(t), *ends) for ends in itertools.pairwise(cuts)
        )

    def mean(k: int) -> float:
        if eps == 0.0:
            mass = integral(lambda t: 1.0, (k - 1) / num_eligible, k / num_eligible)
            return mass / (k * comb(num_eligible, k))

        def of_rate(t: float) -> float:
            p = (1 - eps) * t + eps
            return p ** (k - 1) * (1 - p) ** (num_eligible - k)

        return integral(of_rate, 0.0, 1.0) / num_eligible

    return _coefficients(eligible, mean)


def _coefficients(eligible: list[bool], of_count: Callable[[int], float]) -> Floats:
    """[2^L, L] with `of_count(k)` at the masked positions of each mask of k eligible positions."""
    L = len(eligible)
    c = np.zeros((2**L, L))
    for n, mask in enumerate(patterns(L)):
        if any(m and not e for m, e in zip(mask, eligible, strict=True)):
            continue
        for i in range(L):
            if mask[i]:
                c[n, i] = of_count(sum(mask))
    return c


def _mean_over_p(k: int, num_eligible: int, eps: float) -> float:
    """Integral over t in (0, 1) of p^(k-1) (1-p)^(L_e-k), with p uniform over (eps, 1)."""
    if eps == 0.0:
        return 1.0 / (k * comb(num_eligible, k))  # the beta function B(k, L_e - k + 1)
    return integrate(lambda p: p ** (k - 1) * (1 - p) ** (num_eligible - k), eps, 1.0) / (1 - eps)


def integrate(f: Callable[[float], float], low: float, high: float, order: int = 40) -> float:
    """Gauss-Legendre quadrature, exact for polynomials of degree below 2 * order."""
    nodes, weights = np.polynomial.legendre.leggauss(order)
    middle, half = (low + high) / 2, (high - low) / 2
    return float(sum(w * f(middle + half * x) for x, w in zip(nodes, weights, strict=True)) * half)


def expected_coefficients(
    estimator: Callable[[Floats, float], tuple[tuple[bool, ...], Floats]],
    length: int,
    thresholds: Callable[[float], list[Floats]],
    breaks: list[float],
    order: int = 40,
    ranked: bool = False,
) -> Floats:
    """Mean coefficients of an estimator over its uniforms u in (0,1)^L and its quantile.

    Args:
        estimator: (u [L], quantile) -> (mask, weight of each position's CE [L]): one draw.
        length: number of positions L.
        thresholds: quantile -> cuts of (0, 1) for each position. Between two cuts the mask does
            not depend on u_i, except through the order of the uniforms.
        breaks: quantiles from 0 to 1; between them the estimator is smooth.
        order: number of quadrature nodes between two breaks.
        ranked: whether the mask depends on the order of the uniforms too.
    """
    nodes, weights = np.polynomial.legendre.leggauss(order)
    c = np.zeros((2**length, length))
    for low, high in itertools.pairwise(breaks):
        for x, w in zip(nodes, weights, strict=True):
            quantile = (low + high) / 2 + (high - low) / 2 * x
            for u, probability in _cells(thresholds(quantile), ranked):
                mask, weight = estimator(u, quantile)
                n = sum(1 << i for i, m in enumerate(mask) if m)
                c[n] += w * (high - low) / 2 * probability * np.where(mask, weight, 0.0)
    return c


def _cells(cuts: list[Floats], ranked: bool) -> list[tuple[Floats, float]]:
    """One representative u and its probability for each cell between cuts.

    With `ranked` there is one u for each order of the uniforms in each cell.
    """
    L = len(cuts)
    edges = [np.concatenate([[0.0], np.sort(cut), [1.0]]) for cut in cuts]
    orders = list(itertools.permutations(range(L))) if ranked else [tuple(range(L))]
    result = []
    for bounds in itertools.product(*(list(itertools.pairwise(e)) for e in edges)):
        volume = float(np.prod([high - low for low, high in bounds]))
        if volume == 0.0:
            continue
        for order in orders:
            places = zip(bounds, order, strict=True)
            u = [low + (high - low) * (place + 1) / (L + 1) for (low, high), place in places]
            result.append((np.array(u), volume / len(orders)))
    return result
