"""The state of online P-POTS in a run: the density in use and the measured moments."""

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
    """The state that a checkpoint must hold for a bitwise equal resume.

    Attributes:
        sampler: density in use; before the first fit the uniform density,
            `PiecewiseSampler([0, 1], [1, 1])`.
        moments: running moments, up to the last time that a fit was due.
        pending: exact sums of the values measured since then, int64 [LIMBS, 4 num_bins + 1]. They
            are kept apart from the moments, because rounding in the middle of an interval would
            change the next fit.
    """

    sampler: PiecewiseSampler
    moments: RateMoments
    pending: Integers

    @classmethod
    def start(cls, sampler: PiecewiseSampler, num_bins: int) -> "PpotsState":
        """The state at the start of a run, without measurements."""
        moments = RateMoments(num_bins)
        return cls(sampler, moments, np.zeros((LIMBS, 4 * num_bins + 1), np.int64))

    def merge_pending(self) -> None:
        """Adds the sums since the last fit to the moments, and clears them."""
        self.moments.add(from_limbs(self.pending))
        self.pending = np.zeros_like(self.pending)

    def state_vector(self) -> Integers:
        """The state as one int64 vector.

        It holds the number of edges, the edges and the values (each padded with 0 to TABLE_SIZE)
        and the moments, as the bits of float64 numbers, and then `pending`. Mixed precision does
        not round int64. The length, 2 + 2 TABLE_SIZE + 4 num_bins + LIMBS (4 num_bins + 1), depends
        only on the number of bins.
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
            most_rows: largest number of rows that the run can have measured.

        Raises:
            UserError: the state has another number of bins, or it is damaged: no `most_rows` rows
                can have its sums.
        """
        array = np.array(vector, dtype=np.int64)
        table, sums = 1 + 2 * TABLE_SIZE, 4 * num_bins + 1
        if array.shape != (table + (1 + LIMBS) * sums,):
            raise UserError(
                f"the checkpoint's rate moments do not have {num_bins} bins, or another version of "
                "this program wrote them: resume with the checkpoint's number of bins and version"
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
