"""Tables as text and as Markdown."""

import dataclasses
import math
from collections.abc import Sequence

from megatron_mdm.experiments.statistics import Interval


@dataclasses.dataclass(frozen=True)
class Table:
    """A table: cells as text, and sentences below it.

    Attributes:
        title: what it is of.
        header: of the columns.
        rows: as many cells each.
        notes: sentences below.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def as_text(self) -> str:
        """The first column to the left, the others to the right."""
        lines = [list(self.header), *map(list, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip()
            for first, *rest in lines
        ]
        return "\n".join([self.title, *aligned, *self.notes])

    def as_markdown(self) -> str:
        """With its title above and the notes below."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        body = [f"| {' | '.join(cells)} |" for cells in lines]
        notes = ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join([f"**{self.title}**", "", *body, *notes])


def number(value: float, form: str = ".4f") -> str:
    """A number, or that there is none."""
    if math.isnan(value):
        return "-"
    return "diverged" if math.isinf(value) else f"{value:{form}}"


def interval(value: Interval, form: str = "+.4f") -> str:
    """A mean with the ends of its interval, which one value does not have."""
    if math.isnan(value.low) or math.isinf(value.value):
        return number(value.value, form)
    return f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"
