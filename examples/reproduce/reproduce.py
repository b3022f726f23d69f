"""The paper's table in small: every method on generated arithmetic problems.

    python examples/reproduce/reproduce.py --scale laptop

makes the problems, trains a tokenizer and a small model for each seed, fine-tunes it with every
method, lets each solve held-out problems, and prints tables. Finished runs are kept in --directory:
the same command goes on after an interruption. --report prints, draws and inserts what --json has.
"""

import argparse
import datetime
import functools
import json
import os
import pathlib
import platform
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from methods import ALL, SCALES, Task, tasks
from study import Study
from tables import as_text, draw, insert

from megatron_mdm.errors import UserError, check_numbers, run_tool
from megatron_mdm.experiments.runs import run_parallel
from megatron_mdm.files import check_picture, termination_raises, write_errors, write_json

# What the tables need of a result.
RESULTS = {"scale": str, "machine": str, "date": str, "jobs": int, "runs": list}
RUN = {
    **{"method": str, "seed": int, "epochs": bool, "answers": float, "solutions": float},
    **{"nelbo": float, "rows": int, "problems": int, "seconds": float},
}


def main() -> None:
    """Runs what is missing, prints, writes, draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scale", choices=SCALES, help="ci: minutes, laptop: hours on two cores, gpu: for a GPU"
    )
    parser.add_argument(
        "--directory", default="runs/reproduce", metavar="DIR", help="(default: %(default)s)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs at a time, one core each (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results here, run by run")
    parser.add_argument("--figure", metavar="FILE", help="also draw them: .png or .svg")
    parser.add_argument("--report", metavar="FILE", help="of the results in FILE: train nothing")
    parser.add_argument(
        "--insert",
        nargs="+",
        default=[],
        metavar="FILE",
        help="also put the tables into these Markdown files, where they have places for them",
    )
    options = parser.parse_args()
    if options.figure:
        check_picture(options.figure, "--figure")
    check_numbers(options, "jobs")
    for path in filter(None, (options.figure, options.json)):
        check_writable(path)
    if options.report:
        results = read_results(options.report)
    elif options.scale:
        with termination_raises():
            results = run_all(options)
    else:
        raise UserError("give --scale to train, or --report FILE to print")
    print(as_text(results))
    if options.figure:
        draw(results, options.figure)
    for path in options.insert:
        insert(results, path)


def check_writable(path: str) -> None:
    """Finds out before hours of work whether a file can be written after them."""
    directory = os.path.dirname(os.path.abspath(path))
    with write_errors(path):
        os.makedirs(directory, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()


def read_results(path: str) -> dict[str, Any]:
    """Reads what --json wrote.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        results = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--report {path}: cannot be read ({error}); give a file of --json"
        ) from error
    wrong = lacking(results, RESULTS) or (not results["runs"] and "no runs")
    for run in [] if wrong else results["runs"]:
        wrong = lacking(run, RUN) or (run["method"] not in ALL and f"no method {run['method']}")
        if wrong:
            break
    if wrong:
        raise UserError(f"--report {path}: is not what --json writes ({wrong})")
    return results


def lacking(value: Any, form: dict[str, type]) -> str:
    """What a value lacks of an object with entries of these types; empty if nothing."""
    if not isinstance(value, dict):
        return "an object is missing"
    names = [name for name, kind in form.items() if not isinstance(value.get(name), kind)]
    return f"no {', '.join(names)}" if names else ""


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """Does every run, and writes all results to --json after each."""
    scale = SCALES[options.scale]
    directory = pathlib.Path(options.directory, options.scale)
    with write_errors(str(directory)):
        directory.mkdir(parents=True, exist_ok=True)
    study = Study(scale, directory, options.device)
    _ = study.data  # before any of them needs it
    todo = tasks(scale)
    results: dict[str, Any] = {
        "scale": options.scale,
        "machine": machine(options.device),
        "date": datetime.date.today().isoformat(),
        "jobs": options.jobs,
        "runs": [],
    }
    done: dict[Task, dict[str, Any]] = {}
    lock = threading.Lock()

    def work(task: Task) -> None:
        result = study.fine_tune(task)
        if task.seed != scale.seeds[0]:
            del result["flags"]  # nothing new but the seed
        with lock:
            done[task] = {**task._asdict(), **result}
            results["runs"] = [done[task] for task in todo if task in done]
            if options.json:
                write_json(options.json, results)

    steps: list[Callable[[], object]] = []
    for seed in scale.seeds:
        runs = [task for task in todo if task.seed == seed]
        bases = sorted({ALL[task.method].causal for task in runs})
        steps += [functools.partial(study.pretrain, seed, causal) for causal in bases]
        steps += [functools.partial(work, task) for task in runs]
    run_parallel(options.jobs, lambda step: step(), steps)
    return results


def machine(device: str) -> str:
    """What ran it: the name of the GPU, or the number of cores and theirs."""
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
