"""Gaussian noise on the embeddings of masked tokens, for models that were autoregressive.

The mask token is new to such a model, and all masked positions have the same embedding. LLaDA2.0
(its report, section 7.1) adds noise to these embeddings in the first iterations, because gradients
explode otherwise.

The noise is a function of seed, row, position and channel, so that it is the same in every layout
and after a resume. The numbers are made where they are needed, because there are too many of them
to travel with the rows.
"""

import math

import torch

from megatron_mdm.objective.quantiles import PHI64

GOLDEN = PHI64 - 2**64  # as int64
UNIFORM_BITS = 24  # bits of a uniform number, all of which float32 holds


def noise_keys(seed: int, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One key for each position of each row, int64 [b, s].

    Args:
        seed: seed of the run.
        rows: numbers of the rows, int64 [b].
        positions: numbers of the positions in the row, int64 [b, s].
    """
    start = torch.full_like(rows, (seed * PHI64 + 2**63) % 2**64 - 2**63)
    return _mixed(_mixed(start ^ _mixed(rows * GOLDEN))[:, None] + positions * GOLDEN)


def normals(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Standard normal numbers, a function of the key and the place.

    Args:
        keys: int64 [...].
        count: numbers for each key.

    Returns:
        Float32 [..., count], each at most 5.8 in size (Box and Muller, 1958, on 24-bit uniforms).
    """
    bits = _mixed(keys[..., None] + torch.arange(1, count + 1, device=keys.device) * GOLDEN)
    scale = 2**UNIFORM_BITS
    first, second = (((bits >> shift) & (scale - 1)).float() for shift in (32, 0))
    radius: torch.Tensor = first.add_(1.0).div_(scale).log_().mul_(-2.0).sqrt_()
    angle: torch.Tensor = second.mul_(2.0 * math.pi / scale)
    return radius.mul_(angle.cos_())


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014), modulo 2^64 as int64."""
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A shift to the right that fills with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
