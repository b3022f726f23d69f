"""Moments for tests of P-POTS, of drawn rows and of known curves without noise."""

import numpy as np
import torch

from megatron_mdm.objective.ppots.moments import RateMoments


def measured(rows, num_bins, sampler, value, seed=0):
    """Moments of `rows` rows whose rates `sampler` draws and whose values `value(t, rng)` gives."""
    rng = np.random.default_rng(seed)
    t, weight = sampler(torch.from_numpy(rng.random(rows)))
    moments = RateMoments(num_bins)
    moments.update(t, value(t.numpy(), rng), weight)
    return moments


def moments_of(second_moment, num_bins=30, rows=1000.0, eps=1e-3):
    """Noiseless moments of m2(t, p): means over the bins by a fine midpoint rule in log p."""
    edges = np.log((1 - eps) * np.arange(num_bins + 1) / num_bins + eps)
    x = (np.arange(4000) + 0.5) / 4000
    p = np.exp(edges[:-1, None] + np.diff(edges)[:, None] * x)
    weight = np.diff(edges)[:, None] * p / (1 - eps) * num_bins / 4000
    square = (weight * second_moment((p - eps) / (1 - eps), p)).sum(axis=1)
    ones = np.ones(num_bins)
    return RateMoments.from_vector(
        np.concatenate([ones, np.sqrt(square), square, rows * ones, [0]])
    )


def epr_moment(t, p):
    return (2.0 * np.exp(0.6 * t**2)) ** 2 + 0.8 * t**1.5 + 3.0 * (1 - t) ** 3


def power_moment(t, p):
    return 4.0 * np.exp(0.5 * t) + 2.0 / p


def quadrature(breaks, order=16):
    """Gauss-Legendre nodes and weights over (0, 1), between breaks.

    Each cell is divided more finely towards both ends, because the weight of a steep cell is nearly
    singular at one of them.
    """
    x, w = np.polynomial.legendre.leggauss(order)
    half = np.concatenate([[0.0], 0.5 ** np.arange(16, 0, -1)])
    grading = np.concatenate([half, 1 - half[-2::-1]])
    cuts = np.array(breaks)[:-1, None] + np.diff(breaks)[:, None] * grading
    low, high = cuts[:, :-1].reshape(-1, 1), cuts[:, 1:].reshape(-1, 1)
    nodes, weights = (low + high) / 2 + (high - low) / 2 * x, (high - low) / 2 * w
    return torch.from_numpy(nodes.ravel()), torch.from_numpy(weights.ravel())
