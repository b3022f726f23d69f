"""Measured moments of rows for tests of P-POTS."""

import numpy as np
import torch

from megatron_mdm.objective.ppots.moments import RateMoments


def measured(rows, num_bins, sampler, value, seed=0):
    """Moments of `rows` rows whose rates `sampler` draws."""
    rng = np.random.default_rng(seed)
    t, weight = sampler(torch.from_numpy(rng.random(rows)))
    moments = RateMoments(num_bins)
    moments.update(t, value(t.numpy(), rng), weight)
    return moments
