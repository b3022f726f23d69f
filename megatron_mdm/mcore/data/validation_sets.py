"""The named sets of a validation as one dataset, which Megatron evaluates in one loop."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_mdm.objective.randomness import Split


class ValidationSets(torch.utils.data.Dataset):
    """Equally many rows of each set, one set after another, over and over.

    A row is that of a run which validates on its set alone, with its number, masks and rates; only
    `split` tells the sets apart. A set fills whole global batches, so these hold the same rows too.

    Args:
        sets: a `RowDataset` of each.
        rows: that an evaluation takes of each.
    """

    def __init__(self, sets: Sequence[Any], rows: int) -> None:
        self.sets = sets
        self.rows = rows
        self.split = sets[0].split  # by which Megatron's loader takes the evaluation batch size

    def __len__(self) -> int:
        return len(self.sets[0])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, row = divmod(index % (len(self.sets) * self.rows), self.rows)
        return self.sets[number][row] | {"split": torch.tensor(part_of_set(number))}


def part_of_set(number: int) -> int:
    """The number of a named validation set among the parts of the data, after those of `Split`."""
    return len(Split) + number
