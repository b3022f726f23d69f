"""Does the runs of stages, some at a time, as they become known."""

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from benchmarks.race.plan import Run, Shape
from benchmarks.race.results import Record, Results
from benchmarks.race.tables import Table
from megatron_mdm.experiments.runs import run_parallel


class Stage(Protocol):
    """A module of stages/; see plan.py."""

    def runs(self, results: Results) -> list[Run]:
        """All runs of the stage that are known so far."""

    def summary(self, results: Results) -> list[Table]:
        """Tables of those that are finished."""


def drive(
    stages: Sequence[Stage],
    results: Results,
    train: Callable[[Run], Record],
    jobs: int = 1,
    finished: Callable[[Record], object] = lambda record: None,
) -> None:
    """Trains all runs of the stages that have no result yet, and adds their results.

    Args:
        stages: the runs of the first one are begun first, while they are known.
        results: so far.
        train: does a run.
        jobs: runs at a time.
        finished: called after each result, one call at a time.
    """
    changed = threading.Condition()
    begun: set[Run] = set()
    going = 0
    failed = False

    def next_run() -> Run | None:
        known = (run for stage in stages for run in stage.runs(results))
        return next((run for run in known if run not in begun and run not in results), None)

    def work(_: int) -> None:
        nonlocal going, failed
        while True:
            with changed:
                # A run that is going on may make others known.
                while (run := next_run()) is None and going and not failed:
                    changed.wait()
                if run is None or failed:
                    return
                begun.add(run)
                going += 1
            is_kept = False
            try:
                record = train(run)
                with changed:
                    results.add(record)
                    finished(record)
                is_kept = True
            finally:
                with changed:
                    going -= 1
                    failed = failed or not is_kept
                    changed.notify_all()

    run_parallel(jobs, work, range(jobs))


def seconds_of(run: Run, results: Results) -> float:
    """An estimate of how long a run takes: of steps like its own, or else of as many tokens."""
    like = [x for x in results.records if (_kind(x.run), x.run.judged) == (_kind(run), run.judged)]
    if like:
        return run.steps * sum(x.seconds for x in like) / sum(x.run.steps for x in like)
    scale = results.scale
    shapes = [scale.main, *scale.transfer, *scale.larger, *scale.explain, scale.local]
    shape = next((shape for shape in shapes if _kind(shape) == _kind(run)), scale.main)
    tokens = run.steps * run.rows * run.length
    training = shape.seconds * tokens / (shape.steps * shape.rows * shape.length)
    return training + scale.judging.seconds * run.judged


def _kind(x: Run | Shape) -> tuple[int, int, str]:
    return x.length, x.rows, x.model


def all_runs(stages: Sequence[Stage], results: Results) -> list[Run]:
    """All runs that the stages will need, in the order in which they are begun.

    Of those that follow from results that are missing, as if the middle rate were best for all, and
    the last contender that ends exact the winner.
    """
    known = Results(results.scale, results.records)
    runs: list[Run] = []
    order = {name: place for place, name in enumerate(results.scale.contenders)}
    middle = results.scale.rates[(len(results.scale.rates) - 1) // 2]

    def forecast(run: Run) -> Record:
        nelbo = 2.0 - 0.01 * order.get(run.contender, 0) + (0.1 if run.lr != middle else 0.0)
        return Record(run, (nelbo,) * len(run.evaluated), {}, 0.0, "", "", "")

    drive(stages, known, forecast, finished=lambda record: runs.append(record.run))
    done = [run for stage in stages for run in stage.runs(known) if run in results]
    return list(dict.fromkeys([*done, *runs]))
