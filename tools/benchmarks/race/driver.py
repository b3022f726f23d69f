"""Does the runs of stages, several at a time, as soon as they are known."""

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from benchmarks.race.plan import Run, Shape
from benchmarks.race.results import Record, Results
from benchmarks.race.tables import Table
from megatron_mdm.experiments.runs import run_parallel


class Stage(Protocol):
    """The interface of the modules in stages/; see plan.py."""

    def runs(self, results: Results) -> list[Run]:
        """Returns all runs of the stage that are known so far."""

    def summary(self, results: Results) -> list[Table]:
        """Returns tables of the finished runs."""


def drive(
    stages: Sequence[Stage],
    results: Results,
    train: Callable[[Run], Record],
    jobs: int = 1,
    finished: Callable[[Record], object] = lambda record: None,
) -> None:
    """Does all runs of the stages that have no result yet, and adds their results.

    Args:
        stages: the stages; known runs of earlier stages start first.
        results: the results so far; new results are added to them.
        train: does a run and returns its result.
        jobs: number of runs at a time.
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
                # The result of a run in progress may make further runs known.
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
    """Estimates the seconds of a run from finished runs of its kind, else from its tokens."""
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
    """Returns all runs that the stages will need, in the order in which they start.

    Some runs depend on results that are still missing. For these, the forecast assumes that the
    middle learning rate is best for all contenders, and that the last contender with an exact end
    wins.
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
