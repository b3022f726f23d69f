"""Families of second moments m2(t) that P-POTS chooses from (arXiv 2511.18159).

A family is the square of a mean g(t) plus a variance v(t) over rows and masks, up to a factor. With
p(t) = (1 - eps) t + eps the masking probability,

    epr     m2 = A^2 exp(2 k t^m) + a t^r + b (1-t)^s      k >= 0, m, r, s >= 1
    power   m2 = A^2 exp(2 k t^m) + b p(t)^-r              k >= 0, m >= 1, 0 <= r < 2

EPR, the exponential-polynomial root, is the family of the paper. `power` has the same mean, and the
variance that the Horvitz-Thompson weight 1/p causes: for a row of L tokens with equal cross entropy
c, the variance of the loss over masks is c^2 (1-p) / (p L), and the mean of ||dl/dh||^2 is
proportional to 1/(p L).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_mdm.objective.types import Floats

# Upper bound of k, and of every exponent.
MOST_SLOPE, MOST_EXPONENT = 10.0, 20.0
_SLOPE, _EXPONENT, _FACTOR = (0.0, MOST_SLOPE), (1.0, MOST_EXPONENT), (-15.0, 15.0)


@dataclass(frozen=True)
class Family:
    """A parametric second moment, up to a factor.

    Attributes:
        names: names of the parameters; the first one is the factor A, which is not fitted.
        bounds: bounds of each fitted parameter; the factors a and b are fitted as logarithms. k and
            m come first. With few bins, k and the exponents have narrower bounds (see fit.py).
        prior: center and width of the prior of each fitted parameter; those of k are shares of its
            upper bound.
        moment: (fitted parameters, t, p(t)) -> m2 and its derivatives by each fitted parameter.
        named: (fitted parameters, factor) -> values of `names`.
    """

    names: tuple[str, ...]
    bounds: tuple[tuple[float, float], ...]
    prior: tuple[tuple[float, float], ...]
    moment: Callable[[Floats, Floats, Floats], tuple[Floats, list[Floats]]]
    named: Callable[[Floats, float], tuple[float, ...]]


def _log(x: Floats) -> Floats:
    """Logarithm that is finite (large, negative) at 0, so that x^r = exp(r log x) is 0 there."""
    return np.log(np.maximum(x, 1e-300))


def _square_mean(k: float, m: float, t: Floats) -> tuple[Floats, list[Floats]]:
    """exp(2 k t^m), and its derivatives by k and m."""
    log_t = _log(t)
    power = np.exp(m * log_t)
    square = np.exp(2 * k * power)
    return square, [2 * power * square, 2 * k * power * log_t * square]


def _epr(x: Floats, t: Floats, p: Floats) -> tuple[Floats, list[Floats]]:
    """EPR (arXiv 2511.18159)."""
    k, m, log_a, r, log_b, s = x
    square, derivatives = _square_mean(k, m, t)
    rise, fall = np.exp(log_a + r * _log(t)), np.exp(log_b + s * _log(1 - t))
    derivatives += [rise, rise * _log(t), fall, fall * _log(1 - t)]
    return square + rise + fall, derivatives


def _power(x: Floats, t: Floats, p: Floats) -> tuple[Floats, list[Floats]]:
    k, m, log_b, r = x
    square, derivatives = _square_mean(k, m, t)
    noise = np.exp(log_b - r * np.log(p))
    return square + noise, [*derivatives, noise, -np.log(p) * noise]


# Wide priors: within the bounds, no parameter costs more than half a nat. The exponent of
# Horvitz-Thompson noise is r = 1.
_PRIOR = {"k": (0.0, 2.0), "exponent": (1.0, 20.0), "factor": (0.0, 15.0), "noise": (1.0, 1.0)}

FAMILIES = {
    "power": Family(
        names=("A", "k", "m", "b", "r"),
        bounds=(_SLOPE, _EXPONENT, _FACTOR, (0.0, 1.99)),
        prior=(_PRIOR["k"], _PRIOR["exponent"], _PRIOR["factor"], _PRIOR["noise"]),
        moment=_power,
        named=lambda x, c: (c**0.5, x[0], x[1], c * np.exp(x[2]), x[3]),
    ),
    "epr": Family(
        names=("A", "k", "m", "a", "r", "b", "s"),
        bounds=(_SLOPE, _EXPONENT, _FACTOR, _EXPONENT, _FACTOR, _EXPONENT),
        prior=(_PRIOR["k"], _PRIOR["exponent"], *2 * (_PRIOR["factor"], _PRIOR["exponent"])),
        moment=_epr,
        named=lambda x, c: (c**0.5, x[0], x[1], c * np.exp(x[2]), x[3], c * np.exp(x[4]), x[5]),
    ),
}
