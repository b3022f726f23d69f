"""The state of P-POTS that a run carries: the density in use and what was measured."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_mdm.errors import UserError
from megatron_mdm.objective.ppots.exact_sums import LIMBS, from_limbs
from megatron_mdm.objective.ppots.limits import TABLE_SIZE
from megatron_mdm.objective.ppots.moments import RateMoments
from megatron_mdm.objective.samplers import PiecewiseSampler
from megatron_mdm.objective.types import Integers


@dataclass(eq=False)
class PpotsState:
    """What a run needs to go on bit for bit: the density in use and what was measured so far.

    Attributes:
        sampler: density in use; `PiecewiseSampler([0, 1], [1, 1])`, the uniform, before a fit.
        moments: running moments, up to the last time that a fit was due.
        pending: exact sums of what was measured since, int64 [LIMBS, 4 num_bins + 1]. Apart from
            the moments, because rounding them in the middle of an interval would change the next
            fit.
    """

    sampler: PiecewiseSampler
    moments: RateMoments
    pending: Integers

    @classmethod
    def start(cls, sampler: PiecewiseSampler, num_bins: int) -> "PpotsState":
        """Nothing was measured yet."""
        moments = RateMoments(num_bins)
        return cls(sampler, moments, np.zeros((LIMBS, 4 * num_bins + 1), np.int64))

    def merge_pending(self) -> None:
        """Adds what was measured since the last fit to the moments."""
        self.moments.add(from_limbs(self.pending))
        self.pending = np.zeros_like(self.pending)

    def state_vector(self) -> Integers:
        """Number of edges, edges and values (padded with 0) and moments, as bits; then `pending`.

        int64, which mixed precision does not round; its length, 2 + 2 TABLE_SIZE + 4 num_bins +
        LIMBS (4 num_bins + 1), depends on the number of bins only.
        """
        size = len(self.sampler.edges)
        if size > TABLE_SIZE:
            raise ValueError(f"a table of {size} edges does not fit into {TABLE_SIZE}")
        padding = np.zeros(TABLE_SIZE - size)
        table = [self.sampler.edges, padding, self.sampler.values, padding]
        floats = np.concatenate([[size], *table, self.moments.vector()])
        return np.concatenate([floats.view(np.int64), self.pending.reshape(-1)])

    @classmethod
    def from_state_vector(
        cls, vector: npt.ArrayLike, num_bins: int, most_rows: float = np.inf
    ) -> "PpotsState":
        """The inverse of `state_vector`.

        Args:
            vector: the state, int64.
            num_bins: number of equal bins of t.
            most_rows: rows that can have been measured.

        Raises:
            UserError: the state is of another number of bins, or damaged: it holds sums that no
                rows can have, or not so many.
        """
        array = np.array(vector, dtype=np.int64)
        table, sums = 1 + 2 * TABLE_SIZE, 4 * num_bins + 1
        if array.shape != (table + (1 + LIMBS) * sums,):
            raise UserError(
                f"the checkpoint's rate moments are not of {num_bins} bins, or of another version "
                "of this program: resume with the number of bins and the version of the checkpoint"
            )
        floats, pending_limbs = array[: table + sums].view(np.float64), array[table + sums :]
        size = floats[0]
        try:
            if size not in range(TABLE_SIZE + 1):
                raise ValueError(f"it has {size} edges")
            edges, values = floats[1:table].reshape(2, TABLE_SIZE)[:, : int(size)]
            moments = RateMoments.from_vector(floats[table:])
            state = cls(
                PiecewiseSampler(edges, values), moments, pending_limbs.reshape(LIMBS, sums)
            )
            pending = RateMoments.from_vector(from_limbs(state.pending))
            for part in (moments, pending):
                part.check(most_rows)
            return state
        except ValueError as error:
            raise UserError(
                f"the checkpoint's rate density is damaged ({error}): resume from another one"
            ) from error
