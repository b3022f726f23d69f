"""Tests the paper's claims at a small scale, on generated problems with many seeds from one base.

    python examples/reproduce/reproduce.py --scale laptop

The program makes the problems of each task, trains a tokenizer and a base model on them, fine-tunes
the base model with every method and seed, tests each run on held-out problems, and prints tables.
Finished runs are kept in --directory, so the same command resumes after an interruption. --plan
prints the runs without running them. --report prints, draws and inserts the results of --json
files.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import platform
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

from figure import draw
from methods import (
    METHODS,
    SCALES,
    SEEDS,
    TASKS,
    Run,
    Scale,
    Setting,
    calibration_runs,
    core_hours,
    gate,
    runs,
    stopped_in,
)
from study import Study
from tables import as_text, claims, closed, insert

from megatron_mdm.errors import UserError, check_numbers, run_tool
from megatron_mdm.experiments.program import program
from megatron_mdm.experiments.runs import run_parallel
from megatron_mdm.files import check_picture, termination_raises, write_errors, write_json

PAUSE = 60.0  # seconds between lines about the progress of the runs
# The lists of the results. `closed` has the settings whose other runs are not done.
LISTS = ("stopped", "closed", "diverged", "runs")
# The entries of a result that the tables need.
RESULTS = {
    **{"scale": str, "machine": str, "date": str, "program": str, "jobs": int},
    **dict.fromkeys(LISTS, list),
}
RUN = {
    **{"task": str, "regime": str, "base": int, "method": str, "seed": int},
    **{"answers": float, "solutions": float, "nelbo": float, "right": str},
    **{"unseen": int, "unseen_right": int},
    **{"steps": int, "rows": int, "texts": int, "problems": int, "seconds": float},
}


def main() -> None:
    """Does the missing runs; prints, writes and draws the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scale",
        choices=SCALES,
        help="ci: a smoke test of a minute, which says nothing about methods; laptop: hours on two "
        "cores; gpu: minutes on one GPU",
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, help="only these tasks (default: all of the scale)"
    )
    parser.add_argument(
        "--directory", default="runs/reproduce", metavar="DIR", help="(default: %(default)s)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs at a time, one core each (default: %(default)s)"
    )
    parser.add_argument(
        "--plan", action="store_true", help="print the number of runs of --scale and their cost"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results here, run by run")
    parser.add_argument("--figure", metavar="FILE", help="also draw them: .png or .svg")
    parser.add_argument(
        "--report",
        nargs="+",
        metavar="FILE",
        help="train nothing; report the results in these files, such as those of two calls with "
        "different --tasks",
    )
    parser.add_argument(
        "--insert",
        nargs="+",
        default=[],
        metavar="FILE",
        help="also insert the tables into these Markdown files, between their markers",
    )
    options = parser.parse_args()
    if options.figure:
        check_picture(options.figure, "--figure")
    check_numbers(options, "jobs")
    for path in filter(None, (options.figure, options.json)):
        check_writable(path)
    if options.plan and options.scale:
        print(plan(scale_of(options)))
        return
    if options.report:
        results = joined([read_results(path) for path in options.report])
    elif options.scale:
        with termination_raises():
            results = run_all(options)
    else:
        raise UserError("give --scale to train, or --report FILE to print")
    print(as_text(results))
    print(f"\n{claims(results)}")
    if options.figure:
        draw(results, options.figure)
    for path in options.insert:
        insert(results, path)


def check_writable(path: str) -> None:
    """Checks that a file can be written, before hours of work."""
    directory = os.path.dirname(os.path.abspath(path))
    with write_errors(path):
        os.makedirs(directory, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()


def read_results(path: str) -> dict[str, Any]:
    """Reads a file that --json wrote.

    Raises:
        UserError: the file cannot be read, or is not such a file.
    """
    try:
        results = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--report {path}: cannot be read ({error}); give a file of --json"
        ) from error
    wrong = lacking(results, RESULTS) or (not results["runs"] and "no runs")
    for run in [] if wrong else results["runs"]:
        wrong = lacking(run, RUN) or wrong_names(run)
        if wrong:
            break
    if wrong:
        raise UserError(f"--report {path}: is not what --json writes ({wrong})")
    return results


def lacking(value: Any, form: dict[str, type]) -> str:
    """Names the entries that a value lacks or that have another type; empty if there are none."""
    if not isinstance(value, dict):
        return "an object is missing"
    names = [name for name, kind in form.items() if not isinstance(value.get(name), kind)]
    return f"no {', '.join(names)}" if names else ""


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins the results of several calls for one scale.

    Raises:
        UserError: the results are of different scales, or have a run in common.
    """
    for name in LISTS:
        places = [
            tuple(one.get(key) for key in ("task", "regime", "base", "method", "seed"))
            for part in parts
            for one in part[name]
        ]
        if len(set(places)) < len(places):
            raise UserError("--report: two of the files have a run in common; give one of them")
    if len({part["scale"] for part in parts}) > 1:
        raise UserError("--report: the files are of different scales; report them one by one")
    words = {
        name: "; ".join(dict.fromkeys(part[name] for part in parts))
        for name in ("machine", "date", "program")
    }
    return {
        **parts[0],
        **words,
        **{name: [one for part in parts for one in part[name]] for name in LISTS},
    }


def scale_of(options: argparse.Namespace) -> Scale:
    """Returns the requested scale, with only the settings of the requested tasks."""
    scale = SCALES[options.scale]
    if not options.tasks:
        return scale
    entries = {s: methods for s, methods in scale.entries.items() if s.task in options.tasks}
    if not entries:
        raise UserError(f"--tasks {' '.join(options.tasks)}: --scale {options.scale} has none")
    return dataclasses.replace(scale, entries=entries)


def wrong_names(run: dict[str, Any]) -> str:
    """Names the first unknown name in a run's result; empty if all are known."""
    known = {"task": TASKS, "regime": ("fresh", "scarce"), "method": METHODS}
    return next((f"no {name} {run[name]}" for name in known if run[name] not in known[name]), "")


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """Does all runs, and writes all results to --json after each run."""
    scale = scale_of(options)
    directory = pathlib.Path(options.directory, options.scale)
    with write_errors(str(directory)):
        directory.mkdir(parents=True, exist_ok=True)
    study = Study(scale, directory, options.device)
    todo = runs(scale)
    stopped = stopped_in(scale)
    results: dict[str, Any] = {
        "scale": options.scale,
        "machine": machine(options.device),
        "date": datetime.date.today().isoformat(),
        "program": program(),
        "jobs": options.jobs,
        **{name: [] for name in LISTS},
    }
    done: dict[Run, dict[str, Any]] = {}
    lock = threading.Lock()

    def write() -> None:
        if options.json:
            write_json(options.json, results)

    def look(setting: Setting) -> None:
        if not study.accepts(setting):
            answers = study.fine_tune(gate(setting)).get("answers", 0.0)
            found = {**setting._asdict(), "answers": answers, "accepts": scale.accepts}
            print(closed(found), file=sys.stderr, flush=True)
            with lock:
                results["closed"].append(found)
                write()

    def calibrate(run: Run, count: int) -> None:
        if study.accepts(run.setting):
            study.fine_tune(run, count)

    def find_steps(setting: Setting) -> None:
        if not study.accepts(setting):
            return
        found = study.stopped(setting)
        with lock:
            results["stopped"].append({**setting._asdict(), **found})
            write()

    def work(run: Run) -> None:
        if run != gate(run.setting) and not study.accepts(run.setting):
            return
        result = study.fine_tune(run)
        if run.seed != SEEDS[0]:
            result.pop("flags", None)  # only the seed differs from the first seed's flags
        named = {**run.setting._asdict(), "method": run.method, "seed": run.seed}
        with lock:
            done[run] = {**named, **result}
            found = [done[run] for run in todo if run in done]
            results["diverged"] = [one for one in found if "diverged" in one]
            results["runs"] = [one for one in found if "diverged" not in one]
            write()

    bases = dict.fromkeys((r.setting.task, r.setting.base, METHODS[r.method].causal) for r in todo)
    steps: list[Callable[[], object]] = [
        *(functools.partial(study.pretrain, *base) for base in bases),
        *(functools.partial(look, setting) for setting in scale.entries),
        *(
            functools.partial(calibrate, run, count)
            for setting in stopped
            for run, count in calibration_runs(scale, setting)
        ),
        *(functools.partial(find_steps, setting) for setting in stopped),
        *(functools.partial(work, run) for run in todo),
    ]
    with shown(study):
        run_parallel(options.jobs, lambda step: step(), steps)
    return results


@contextlib.contextmanager
def shown(study: Study) -> Iterator[None]:
    """Shows the running processes and their progress on stderr every minute, in its context."""
    over = threading.Event()

    def show() -> None:
        while not over.wait(PAUSE):
            print(
                "".join(f"{line}\n" for line in study.progress(PAUSE / 2)), end="", file=sys.stderr
            )

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def plan(scale: Scale) -> str:
    """Describes the runs of a scale, and their core-hours if these are known."""
    lines = []
    for setting, methods in scale.entries.items():
        task, regime, _ = setting
        lines.append(
            f"{setting.title}: {scale.steps[task]} steps of {scale.batch} rows, "
            f"{scale.pairs[regime]} texts"
        )
        lines += [f"    {count:3d} x {method}" for method, count in methods.items()]
    for setting in stopped_in(scale):
        lines.append(f"{setting.title}: {len(calibration_runs(scale, setting))} for calibration")
    hours = core_hours(scale)
    return "\n".join(
        [
            *lines,
            f"{len(runs(scale))} runs, "
            + ("not measured yet" if hours is None else f"about {hours:.1f} core-hours in all"),
        ]
    )


def machine(device: str) -> str:
    """Describes the machine: the name of the GPU, or the number and name of the CPU's cores."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    names = ""
    if os.path.exists("/proc/cpuinfo"):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = next((line.partition(": ")[2] for line in lines if "model name" in line), "")
    return f"{os.cpu_count()} cores of {names or platform.machine()}"


if __name__ == "__main__":
    run_tool(main)
