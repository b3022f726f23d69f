"""Sums of float64 numbers that do not depend on the order of the additions.

Floating-point sums are rounded after each addition: (a + b) + c is not a + (b + c). A run that
saves a checkpoint in between, or splits its batch over other ranks, would get different last bits.
Here a number is split into LIMBS integers of BITS bits each, and sums of integers are exact.
"""

import numpy as np
import numpy.typing as npt
import torch

LIMBS = 4
BITS = 30
# Exponent of the lowest bit that is kept.
LOWEST = -70
# 2^50. Numbers must be smaller in magnitude. 2**(63 - BITS), 8.6 billion, of them can be added.
BOUND = 2.0 ** (LIMBS * BITS + LOWEST)


def to_limbs(x: torch.Tensor) -> torch.Tensor:
    """Splits float64 [...] below BOUND in magnitude into int64 [LIMBS, ...], lowest limb first.

    Bits below 2**LOWEST are cut off; everything else is exact.
    """
    limbs = []
    for i in reversed(range(LIMBS)):
        unit = 2.0 ** (LOWEST + i * BITS)
        whole = torch.trunc(x / unit)
        x = x - whole * unit
        limbs.append(whole.to(torch.int64))
    return torch.stack(limbs[::-1])


def from_limbs(limbs: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Turns sums of results of `to_limbs`, int64 [LIMBS, n], into float64 [n], rounded once."""
    numbers = np.asarray(limbs).T.tolist()
    exact = [sum(limb << i * BITS for i, limb in enumerate(number)) for number in numbers]
    return np.array([number / 2**-LOWEST for number in exact])
