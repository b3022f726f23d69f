"""Sums of float64 numbers that depend on the numbers alone, not on the order they are added in.

Floating-point sums are rounded after each addition: (a + b) + c is not a + (b + c). A run that
saves a checkpoint on the way, or splits its batch over other ranks, would go on with other last
bits. Here a number is written in LIMBS integers of BITS bits each, and integers add up exactly.
"""

import numpy as np
import numpy.typing as npt
import torch

LIMBS = 4
BITS = 30
# Exponent of the lowest bit that is kept.
LOWEST = -70
# Numbers must be smaller in magnitude, 2^50; 2**(63 - BITS), 8.6 billion of them can be added.
BOUND = 2.0 ** (LIMBS * BITS + LOWEST)


def to_limbs(x: torch.Tensor) -> torch.Tensor:
    """float64 [...] below BOUND in magnitude -> int64 [LIMBS, ...], lowest first.

    What lies below 2**LOWEST is cut off; everything else is exact.
    """
    limbs = []
    for i in reversed(range(LIMBS)):
        unit = 2.0 ** (LOWEST + i * BITS)
        whole = torch.trunc(x / unit)
        x = x - whole * unit
        limbs.append(whole.to(torch.int64))
    return torch.stack(limbs[::-1])


def from_limbs(limbs: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Sums of results of `to_limbs`, int64 [LIMBS, n] -> float64 [n], rounded once."""
    numbers = np.asarray(limbs).T.tolist()
    exact = [sum(limb << i * BITS for i, limb in enumerate(number)) for number in numbers]
    return np.array([number / 2**-LOWEST for number in exact])
