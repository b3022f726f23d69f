"""A control variate for the logged loss: removes the variance that the drawn rates explain.

It changes only the REPORTED number. It does not depend on the model's parameters, so it has no
gradient and cannot change training.
"""

import numpy as np
import torch

from megatron_mdm.objective.samplers import RateSampler
from megatron_mdm.objective.types import Floats


class ControlVariate:
    """Mean loss, with a moving average b(t) of the loss at rate t as the control variate.

    This is EMA (arXiv 2511.18159).

    Let w be the importance weight of t, and let b be constant within each bin of t. The mean over
    rows of

        w l - w b(t) + E[w b(t)]

    has the same expectation as the mean of w l under every density of t, because b comes from
    earlier intervals. Its variance is lower by the part that b explains. E[w b(t)] is the sum over
    bins of b times the mass of the objective in the bin (`bin_masses`). If w is 1/q(t), as for
    P-POTS, this mass is the width of the bin.

    Args:
        num_bins: number of equal bins of t in (0, 1].
        decay: share of the old average that an update keeps, in [0, 1]; 1 gives the plain mean.
    """

    def __init__(self, num_bins: int, decay: float) -> None:
        self.num_bins = num_bins
        self.decay = decay
        self.baseline: Floats | None = None

    def __call__(self, loss_sums: Floats, weight_sums: Floats, rows: int, masses: Floats) -> float:
        """Returns the controlled mean loss of an interval, then updates the average with it.

        Args:
            loss_sums: sum of w l over the rows in each bin [num_bins], nats per token.
            weight_sums: sum of w over the rows in each bin [num_bins].
            rows: number of rows of the interval.
            masses: see `bin_masses` [num_bins]; their mean over the rows, if the density changed
                within the interval.

        Returns:
            Nats per token; the plain mean at the first call.
        """
        mean = float(loss_sums.sum()) / rows
        if self.baseline is not None:
            mean += float(self.baseline @ (masses - weight_sums / rows))
        if self.decay < 1.0:
            # A NaN would never leave the average.
            seen = (weight_sums > 0) & np.isfinite(loss_sums)
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
    """E[w 1(t in bin)] for equal bins: the mass of the objective in each [num_bins]."""
    edges = torch.linspace(0.0, 1.0, num_bins + 1, dtype=torch.float64)
    masses: Floats = sampler.objective_mass(edges).diff().numpy()
    return masses
