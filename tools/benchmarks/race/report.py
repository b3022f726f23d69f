"""Prints results, and inserts them into Markdown files."""

from collections.abc import Callable
from functools import partial

from benchmarks.race import decide
from benchmarks.race.results import Results
from benchmarks.race.stages import STAGES
from benchmarks.race.tables import Table
from megatron_mdm.experiments import pages

_SUMMARIES: dict[str, Callable[[Results], list[Table]]] = {
    **{name: stage.summary for name, stage in STAGES.items()},
    "claims": decide.summary,
}


def as_text(results: Results) -> str:
    """Returns all tables as text."""
    tables = [table for summary in _SUMMARIES.values() for table in summary(results)]
    return "\n\n".join([*(table.as_text() for table in tables), caption(results)])


def caption(results: Results) -> str:
    """Describes the origin of the results: number of runs, hours, machines and programs."""
    records = results.records
    hours = sum(record.seconds for record in records) / 3600
    programs = "; ".join(sorted({record.program for record in records}))
    machines = "; ".join(sorted({record.machine for record in records}))
    return f"{len(records)} runs of {hours:.1f} hours in all, on {machines}; {programs}"


def insert(results: Results, path: str) -> None:
    """Inserts results at the markers `race` of a Markdown file; see `experiments.pages.insert`.

    The name in a marker is that of a stage, `claims`, or `caption`.
    """

    def tables(name: str) -> str:
        return "".join(f"\n{table.as_markdown()}\n" for table in _SUMMARIES[name](results))

    blocks: dict[str, Callable[[], str]] = {name: partial(tables, name) for name in _SUMMARIES}
    pages.insert(path, "race", {**blocks, "caption": partial(caption, results)})
