"""Tables as text and as Markdown."""

import dataclasses
import math
from collections.abc import Sequence

from megatron_mdm.experiments.statistics import Interval


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text cells, with notes below it.

    Attributes:
        title: title of the table.
        header: headings of the columns.
        rows: rows of cells, as many as the header has.
        notes: sentences below the table.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def as_text(self) -> str:
        """Returns plain text; the first column is left-aligned, the others right-aligned."""
        lines = [list(self.header), *map(list, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip()
            for first, *rest in lines
        ]
        return "\n".join([self.title, *aligned, *self.notes])

    def as_markdown(self) -> str:
        """Returns Markdown, with the title above and the notes below."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        body = [f"| {' | '.join(cells)} |" for cells in lines]
        notes = ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join([f"**{self.title}**", "", *body, *notes])


def number(value: float, form: str = ".4f") -> str:
    """Formats a number; "-" if it is not known, "diverged" if it is infinite."""
    if math.isnan(value):
        return "-"
    return "diverged" if math.isinf(value) else f"{value:{form}}"


def interval(value: Interval, form: str = "+.4f") -> str:
    """Formats a mean with the ends of its interval; a single value has no interval."""
    if math.isnan(value.low) or math.isinf(value.value):
        return number(value.value, form)
    return f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"
