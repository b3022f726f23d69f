"""The results of finished runs, and queries on them."""

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
        run: the run.
        nelbo: NELBO on the held-out rows after the steps of `run.evaluated`, in nats per token;
            fewer values if the run diverged.
        bins: middle of a bin of t -> loss in it at the last evaluation.
        seconds: duration of the run in seconds.
        program: commit and libraries of the run.
        machine: machine of the run.
        name: name of the run's files in --directory, without suffix.
        judged: result of judge.py; empty if the run is not judged or diverged.
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
        """NELBO at the end; infinite for a run that diverged."""
        return self.nelbo[-1] if len(self.nelbo) == len(self.run.evaluated) else math.inf

    def as_json(self) -> dict[str, Any]:
        """Returns the record as an object for a file of --json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Record":
        """Makes a record from an object of a --json file.

        Raises:
            KeyError, TypeError: the object is not a record.
        """
        run = dict(value["run"])
        run["flags"] = tuple(run["flags"])
        rest = {**value, "run": Run(**run), "nelbo": tuple(value["nelbo"])}
        return cls(**rest)


class Results:
    """Records, indexed by their runs.

    Attributes:
        scale: the scale of the race.
    """

    def __init__(self, scale: Scale, records: Iterable[Record] = ()) -> None:
        self.scale = scale
        self._records = {record.run: record for record in records}

    def add(self, record: Record) -> None:
        """Adds the result of a run; replaces an earlier one."""
        self._records[record.run] = record

    def __contains__(self, run: Run) -> bool:
        return run in self._records

    def __getitem__(self, run: Run) -> Record:
        return self._records[run]

    @property
    def records(self) -> list[Record]:
        """All records, in the order in which they were added."""
        return list(self._records.values())

    def finals(self, runs: Iterable[Run]) -> Finals:
        """Returns final NELBO by contender and seed, for the finished ones of these runs."""
        found: Finals = {}
        for run in runs:
            if run in self:
                found.setdefault(run.contender, {})[run.seed] = self[run].final
        return found

    def origins(self, runs: Iterable[Run]) -> list[str]:
        """Returns a note for a table if its runs have several program versions or machines."""
        records = [self[run] for run in runs if run in self]
        programs, machines = ({getattr(x, of) for x in records} for of in ("program", "machine"))
        if max(len(programs), len(machines)) <= 1:
            return []
        return [
            f"of {len(programs)} programs and {len(machines)} machines, which may differ by more "
            f"than the contenders do: {'; '.join(sorted(programs))}; {'; '.join(sorted(machines))}"
        ]


def differences(of: Mapping[int, float], baseline: Mapping[int, float]) -> list[float]:
    """Returns the differences by seed, for the seeds that both have."""
    return [value - baseline[seed] for seed, value in of.items() if seed in baseline]
