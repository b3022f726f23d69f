"""Compares training with different densities of t at equal compute, with `megatron_mdm.pretrain`.

The race trains small byte-level models on the source code of Python's standard library. Its stages
follow rules that were written down before (RULES.md): learning rates are tuned on one seed;
contenders are compared on fresh seeds; the winner is tested with other row lengths, a larger model
and more steps. Finished runs are kept in --directory, so that an interrupted race resumes. Runs of
another program version or of other data are trained again; their results stay in --json until then.
Results of stages that are not requested are read from --json. Only one race at a time may use a
--directory and a --json.
"""

import argparse
import datetime
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from benchmarks.race.results import Record, Results
from megatron_mdm.errors import UserError, check_numbers
from megatron_mdm.file_locks import locked
from megatron_mdm.files import (
    check_output,
    check_picture,
    termination_raises,
    write_errors,
    write_json,
)

if TYPE_CHECKING:
    from benchmarks.race.driver import Stage

DESCRIPTION = "final NELBO of each density of t at equal compute"
_SCALES = ("laptop", "ci")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument(
        "--scale", choices=_SCALES, default="laptop", help="ci: runs of seconds (default: laptop)"
    )
    parser.add_argument(
        "--stages", nargs="+", metavar="NAME", help="stages to run (default: all, in their order)"
    )
    parser.add_argument(
        "--directory",
        default="runs/race",
        metavar="DIR",
        help="directory for the data and the finished runs (default: %(default)s)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the results here after each run (default: in DIR)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, one thread each (default: %(default)s)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument("--plan", action="store_true", help="print the runs: train nothing")
    parser.add_argument("--report", metavar="FILE", help="report FILE's results: train nothing")
    parser.add_argument("--figure", metavar="FILE", help="also draw the results: .png or .svg")
    parser.add_argument(
        "--insert",
        nargs="+",
        default=[],
        metavar="FILE",
        help="also insert the tables into these Markdown files, between their markers",
    )


def run(args: argparse.Namespace) -> None:
    """Does the missing runs, or reports the results of a file.

    Raises:
        UserError: a setting is not possible, or a run failed.
    """
    from benchmarks.race.scales import SCALES
    from benchmarks.race.stages import STAGES

    check_numbers(args, "jobs")
    unknown = [name for name in args.stages or [] if name not in STAGES]
    if unknown:
        raise UserError(f"--stages {unknown[0]}: there are {', '.join(STAGES)}")
    asked = [name for name in STAGES if name in (args.stages or STAGES)]
    path = args.json or os.path.join(args.directory, "race.json")
    if args.figure:
        check_picture(args.figure, "--figure")
        check_output(args.figure, "--figure")
    if args.report:
        _report(_read(args.report), args)
        return
    check_output(path, "--json")
    stages = {name: STAGES[name] for name in asked}
    if args.plan:
        _print_plan(Results(SCALES[args.scale], _kept(path, args.scale)), stages)
        return
    directory = pathlib.Path(args.directory)
    with write_errors(str(directory)):
        directory.mkdir(parents=True, exist_ok=True)
    with termination_raises(), _alone(str(directory / "race")), _alone(path):
        results = _train(stages, directory, args, path)
    _report(results, args)


@contextmanager
def _alone(path: str) -> Iterator[None]:
    """Locks a path, so that no other race writes to it.

    Raises:
        UserError: another race holds the lock.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(f"{path}.lock", wait=False))
        except OSError as error:
            raise UserError(
                f"{path}.lock cannot be locked ({error}): another race is at work there. Wait for "
                "it, or give another --directory and --json"
            ) from error
        yield


def _train(
    stages: "dict[str, Stage]", directory: pathlib.Path, args: argparse.Namespace, path: str
) -> Results:
    """Does the runs of the stages, and writes all results after each run."""
    from benchmarks.race.driver import drive
    from benchmarks.race.scales import SCALES
    from benchmarks.race.training import Trainer

    kept = _kept(path, args.scale)
    # Earlier records of the requested stages are left out, so that these stages only depend on runs
    # of this program version.
    earlier = (record for record in kept if record.run.stage not in stages)
    results = Results(SCALES[args.scale], earlier)
    train = Trainer(results.scale, directory, args.device)

    def finished(record: Record) -> None:
        write_json(path, _as_json(args, Results(results.scale, [*kept, *results.records])))
        print(f"{record.run.text()}: {record.final:.4f}", file=sys.stderr, flush=True)

    drive(list(stages.values()), results, train, args.jobs, finished)
    return results


def _report(results: Results, args: argparse.Namespace) -> None:
    """Prints, draws and inserts results."""
    from benchmarks.race import figure, report

    print(report.as_text(results))
    if args.figure:
        figure.draw(results, args.figure)
    for path in args.insert:
        report.insert(results, path)


def _as_json(args: argparse.Namespace, results: Results) -> dict[str, Any]:
    return {
        "scale": args.scale,
        "date": datetime.date.today().isoformat(),
        "jobs": args.jobs,
        "runs": [record.as_json() for record in results.records],
    }


def _kept(path: str, scale: str) -> list[Record]:
    """Reads the records that an earlier call wrote to --json, if there are any.

    Raises:
        UserError: the file holds something else, or results of another scale.
    """
    from benchmarks.race.scales import SCALES

    if not pathlib.Path(path).exists():
        return []
    results = _read(path)
    if results.scale != SCALES[scale]:
        raise UserError(f"--json {path} is not of --scale {scale}: give another file")
    return results.records


def _read(path: str) -> Results:
    """Reads a file that --json wrote.

    Raises:
        UserError: the file cannot be read, or is not such a file.
    """
    from benchmarks.race.scales import SCALES

    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        return Results(SCALES[value["scale"]], map(Record.from_json, value["runs"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not what --json of the race writes ({error!r})") from error


def _print_plan(results: Results, stages: "dict[str, Stage]") -> None:
    """Prints all runs, and the core-hours that each stage takes and still needs."""
    from benchmarks.race.driver import all_runs, seconds_of

    planned = all_runs(list(stages.values()), results)
    hours = {run: seconds_of(run, results) / 3600 for run in planned}
    for run in planned:
        print(f"{'done' if run in results else '':5s}{60 * hours[run]:5.1f} min  {run.text()}")
    print(f"{'':12s}{'runs':>6s}{'done':>6s}{'core-hours':>12s}{'to go':>8s}")
    for name in [*stages, "all"]:
        some = [run for run in planned if name in (run.stage, "all")]
        left = [run for run in some if run not in results]
        print(
            f"{name:12s}{len(some):6d}{len(some) - len(left):6d}"
            f"{sum(map(hours.__getitem__, some)):12.2f}{sum(map(hours.__getitem__, left)):8.2f}"
        )
