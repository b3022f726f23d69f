"""A steadier figure of the loss in the logs: subtract what the rates that were drawn explain.

It changes the REPORTED number only: a control variate that does
not depend on the model's parameters has no gradient, so it cannot change training.
"""

import numpy as np
import torch

from megatron_mdm.objective.samplers import RateSampler
from megatron_mdm.objective.types import Floats

# Nodes of the quadrature between two edges. Densities of objectives are linear there, or 1.
_NODES = 4


class ControlVariate:
    """Mean loss with a moving average b(t) of the loss at rate t as control variate.

    This is EMA (arXiv 2511.18159).

    With w the importance weight of t and b constant within each bin of t, the mean over rows of

        w l - w b(t) + E[w b(t)]

    has the expectation of w l under every density of t, since b comes from earlier intervals, and a
    variance less by what b explains. E[w b(t)] is the sum of b over the bins, each with the mass
    that the objective has in it (`bin_masses`): its width where w is 1/q(t), P-POTS included.

    Args:
        num_bins: equal bins of t in (0, 1].
        decay: what the average keeps at each update, in [0, 1]; 1 leaves the plain mean.
    """

    def __init__(self, num_bins: int, decay: float) -> None:
        self.num_bins = num_bins
        self.decay = decay
        self.baseline: Floats | None = None

    def __call__(self, loss_sums: Floats, weight_sums: Floats, rows: int, masses: Floats) -> float:
        """The controlled mean loss of an interval, which then enters the average.

        Args:
            loss_sums: sum of w l over the rows in each bin [num_bins], nats per token.
            weight_sums: sum of w over them [num_bins].
            rows: number of rows of the interval.
            masses: see `bin_masses` [num_bins]; their mean over the rows, if the density has moved.

        Returns:
            Nats per token; the plain mean at the first call.
        """
        mean = float(loss_sums.sum()) / rows
        if self.baseline is not None:
            mean += float(self.baseline @ (masses - weight_sums / rows))
        if self.decay < 1.0:
            seen = (weight_sums > 0) & np.isfinite(loss_sums)  # a NaN would stay for good
            if not seen.any():
                return mean
            now = np.full_like(loss_sums, loss_sums[seen].sum() / weight_sums[seen].sum())
            now[seen] = loss_sums[seen] / weight_sums[seen]
            if self.baseline is None:
                self.baseline = now
            else:
                moved = self.decay * self.baseline + (1.0 - self.decay) * now
                self.baseline = np.where(seen, moved, self.baseline)
        return mean


def bin_masses(sampler: RateSampler, num_bins: int) -> Floats:
    """E[w 1(t in bin)] for equal bins of t: the integral of density times weight [num_bins]."""
    kinks = sampler(torch.tensor(sampler.breaks, dtype=torch.float64))[0].numpy()
    bins = np.linspace(0.0, 1.0, num_bins + 1)
    edges = np.union1d(bins, kinks)
    nodes, shares = np.polynomial.legendre.leggauss(_NODES)
    middles, halves = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    t = torch.from_numpy(middles[:, None] + halves[:, None] * nodes)
    masses = halves * ((sampler.density(t) * sampler.weight(t)).numpy() @ shares)
    return np.bincount(np.searchsorted(bins, middles) - 1, masses, num_bins)
