"""A steadier figure of the loss in the logs: subtract what the rates that were drawn explain.

It changes the REPORTED number only: a control variate that does
not depend on the model's parameters has no gradient, so it cannot change training.
"""

import numpy as np

from megatron_mdm.objective.types import Floats


class ControlVariate:
    """Mean loss with a moving average b(t) of the loss at rate t as control variate.

    This is EMA (arXiv 2511.18159).

    With w the importance weight of t and b constant within each bin of t, the mean over rows of

        w l - w b(t) + E[w b(t)]

    has the expectation of w l under every density of t, since b comes from earlier intervals, and a
    variance less by what b explains. E[w b(t)] is the integral of b where w is 1/q(t), P-POTS
    included; for rates clipped to (low, high) without a weight it is their mean of b.

    Args:
        num_bins: equal bins of t in (0, 1].
        decay: what the average keeps at each update, in [0, 1]; 1 leaves the plain mean.
        low, high: ends of the rates, if these are clipped.
    """

    def __init__(self, num_bins: int, decay: float, low: float = 0.0, high: float = 1.0) -> None:
        edges = np.linspace(0.0, 1.0, num_bins + 1).clip(low, high)
        self.mass: Floats = np.diff(edges) / (high - low)
        self.decay = decay
        self.baseline: Floats | None = None

    def __call__(self, loss_sums: Floats, weight_sums: Floats, rows: int) -> float:
        """The controlled mean loss of an interval, which then enters the average.

        Args:
            loss_sums: sum of w l over the rows in each bin [num_bins], nats per token.
            weight_sums: sum of w over them [num_bins].
            rows: number of rows of the interval.

        Returns:
            Nats per token; the plain mean at the first call.
        """
        mean = float(loss_sums.sum()) / rows
        if self.baseline is not None:
            mean += float(self.baseline @ (self.mass - weight_sums / rows))
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
