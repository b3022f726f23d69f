"""Named validation sets, and block sizes, as one dataset, which Megatron evaluates in one loop."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_mdm.objective.randomness import Split


class ValidationSets(torch.utils.data.Dataset):
    """The same number of rows from each set, one set after another, repeated without end.

    Each row has the number, masks and rates that it has in a run that validates only on its set;
    only `split` tells the sets apart. A set fills whole global batches, so a global batch also
    holds the same rows as in such a run.

    Args:
        sets: one `RowDataset` per set. With several block sizes, all sets follow one another for
            the first size, then for the second, and so on.
        rows: number of rows that an evaluation takes from each set.
        first: number of the first set.
    """

    def __init__(self, sets: Sequence[Any], rows: int, first: int = 0) -> None:
        self.sets = sets
        self.rows = rows
        self.first = first
        self.split = sets[0].split  # tells Megatron's loader to use the evaluation batch size

    def __len__(self) -> int:
        return len(self.sets[0])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, row = divmod(index % (len(self.sets) * self.rows), self.rows)
        return self.sets[number][row] | {"split": torch.tensor(part_of_set(self.first + number))}


def part_of_set(number: int) -> int:
    """The part number of a named validation set; the numbers follow those of `Split`."""
    return len(Split) + number
