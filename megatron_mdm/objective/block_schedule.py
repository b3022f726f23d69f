"""The size of blocks over the course of a run."""

import bisect
import itertools
from dataclasses import dataclass

from megatron_mdm.errors import UserError


@dataclass(frozen=True)
class BlockSchedule:
    """A step function from finished iterations (or samples) to the block size.

    Attributes:
        starts: number of finished iterations from which each phase lasts; increasing, the first 0.
        sizes: tokens in a block in each phase; None: whole rows.
    """

    starts: tuple[int, ...]
    sizes: tuple[int | None, ...]

    @classmethod
    def constant(cls, size: int | None) -> "BlockSchedule":
        """One size for the whole run."""
        return cls((0,), (size,))

    @classmethod
    def parse(cls, text: str, flag: str) -> "BlockSchedule":
        """Reads a schedule such as `0:1 1000:4 2000:32 8000:row`.

        Args:
            text: phases, each as its start, a colon and its size, or `row` for whole rows.
            flag: name of the flag, for the message.

        Raises:
            UserError: the text is not a schedule.
        """
        phases = [phase.partition(":") for phase in text.split()]
        for start, _, size in phases:
            if not start.isdecimal() or not (size == "row" or (size.isdecimal() and int(size))):
                raise UserError(
                    f'{flag} takes phases START:SIZE, for example "0:4 1000:32 8000:row", with '
                    f'SIZE a number of tokens or `row`; got "{text}"'
                )
        starts = tuple(int(start) for start, _, _ in phases)
        if not starts or starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
            raise UserError(f'{flag} must begin at 0, and its phases must follow: got "{text}"')
        return cls(starts, tuple(None if size == "row" else int(size) for _, _, size in phases))

    def size(self, finished: int) -> int | None:
        """Tokens in a block after so many finished iterations (or samples); None: whole rows."""
        return self.sizes[bisect.bisect_right(self.starts, finished) - 1]

    def last_size(self, finished: int) -> int | None:
        """Tokens in a block in the last of so many iterations (or samples); None: whole rows."""
        return self.size(max(0, finished - 1))

    def until(self, finished: int) -> tuple[tuple[int, int | None], ...]:
        """The phases that have begun before so many finished iterations, as (start, size).

        Equal neighbours are one phase, so that two schedules that have acted alike compare equal.
        """
        begun: list[tuple[int, int | None]] = []
        for start, size in zip(self.starts, self.sizes, strict=True):
            if start < finished and not (begun and begun[-1][1] == size):
                begun.append((start, size))
        return tuple(begun)
