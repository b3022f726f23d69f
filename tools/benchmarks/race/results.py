"""The results of finished runs, and the questions that stages ask of them."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.race.plan import Run, Scale

Finals = dict[str, dict[int, float]]  # final NELBO by contender and seed


@dataclasses.dataclass(frozen=True)
class Record:
    """The result of a run.

    Attributes:
        run: what was trained.
        nelbo: on the held-out rows after the steps of `run.evaluated`, nats per token; fewer where
            the run has diverged.
        bins: loss by the middle of a bin of t at the last evaluation.
        seconds: that it took.
        program: commit and libraries that it was made with.
        machine: that it was made on.
        name: what its files in --directory are called, without an ending.
        judged: what judge.py says, of a run with `judged` that has not diverged.
    """

    run: Run
    nelbo: tuple[float, ...]
    bins: Mapping[str, float]
    seconds: float
    program: str
    machine: str
    name: str
    judged: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    @property
    def final(self) -> float:
        """At the end; infinite for a run that has diverged."""
        return self.nelbo[-1] if len(self.nelbo) == len(self.run.evaluated) else math.inf

    def as_json(self) -> dict[str, Any]:
        """For a file of --json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Record":
        """From a file of --json.

        Raises:
            KeyError, TypeError: it is something else.
        """
        run = dict(value["run"])
        run["flags"] = tuple(run["flags"])
        rest = {**value, "run": Run(**run), "nelbo": tuple(value["nelbo"])}
        return cls(**rest)


class Results:
    """Records by their runs.

    Attributes:
        scale: of the race.
    """

    def __init__(self, scale: Scale, records: Iterable[Record] = ()) -> None:
        self.scale = scale
        self._records = {record.run: record for record in records}

    def add(self, record: Record) -> None:
        """Adds the result of a run, in the place of an earlier one."""
        self._records[record.run] = record

    def __contains__(self, run: Run) -> bool:
        return run in self._records

    def __getitem__(self, run: Run) -> Record:
        return self._records[run]

    @property
    def records(self) -> list[Record]:
        """All of them, in the order in which they were added."""
        return list(self._records.values())

    def finals(self, runs: Iterable[Run]) -> Finals:
        """Final NELBO by contender and seed, of those of the runs that are finished."""
        found: Finals = {}
        for run in runs:
            if run in self:
                found.setdefault(run.contender, {})[run.seed] = self[run].final
        return found

    def origins(self, runs: Iterable[Run]) -> list[str]:
        """A note for a table of these runs if they are not of one program and of one machine."""
        records = [self[run] for run in runs if run in self]
        programs, machines = ({getattr(x, of) for x in records} for of in ("program", "machine"))
        if max(len(programs), len(machines)) <= 1:
            return []
        return [
            f"of {len(programs)} programs and {len(machines)} machines, which may differ by more "
            f"than the contenders do: {'; '.join(sorted(programs))}; {'; '.join(sorted(machines))}"
        ]


def differences(of: Mapping[int, float], baseline: Mapping[int, float]) -> list[float]:
    """By seed, of the seeds that both have."""
    return [value - baseline[seed] for seed, value in of.items() if seed in baseline]
