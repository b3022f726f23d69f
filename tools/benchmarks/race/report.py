"""What is printed of results, and put into Markdown files."""

import pathlib
import re
from collections.abc import Callable

from benchmarks.race import decide
from benchmarks.race.results import Results
from benchmarks.race.stages import STAGES
from benchmarks.race.tables import Table
from megatron_mdm.errors import UserError
from megatron_mdm.files import write_text

_SUMMARIES: dict[str, Callable[[Results], list[Table]]] = {
    **{name: stage.summary for name, stage in STAGES.items()},
    "claims": decide.summary,
}
_PLACE = re.compile(r"(<!-- race: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def as_text(results: Results) -> str:
    """All tables."""
    tables = [table for summary in _SUMMARIES.values() for table in summary(results)]
    return "\n\n".join([*(table.as_text() for table in tables), caption(results)])


def caption(results: Results) -> str:
    """Where results come from."""
    records = results.records
    hours = sum(record.seconds for record in records) / 3600
    programs = "; ".join(sorted({record.program for record in records}))
    machines = "; ".join(sorted({record.machine for record in records}))
    return f"{len(records)} runs of {hours:.1f} hours in all, on {machines}; {programs}"


def insert(results: Results, path: str) -> None:
    """Replaces what stands between `<!-- race: NAME -->` and `<!-- end -->` in a Markdown file.

    A name is that of a stage, `claims`, or `caption`.

    Raises:
        UserError: the file cannot be read or written, or has no such place.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--insert {path}: cannot be read ({error})") from error
    names = [*_SUMMARIES, "caption"]
    places = [name for _, name, _ in _PLACE.findall(text)]
    if not places or not set(places) <= set(names):
        raise UserError(
            f"--insert {path}: needs <!-- race: NAME --> with an <!-- end -->, and NAME of "
            f"{', '.join(names)}"
        )

    def replacement(match: re.Match[str]) -> str:
        if match[2] == "caption":
            return f"{match[1]}{caption(results)}\n{match[3]}"
        tables = [table.as_markdown() for table in _SUMMARIES[match[2]](results)]
        return "\n\n".join([match[1].rstrip("\n"), *tables, match[3]])

    write_text(path, _PLACE.sub(replacement, text))
