"""Runs with cached results: a run is named by a digest of its inputs, and executed only once."""

import concurrent.futures
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import re
import runpy
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_mdm.config import flag_of
from megatron_mdm.data.identity import quick_digest
from megatron_mdm.data.record import file_digest, made_from
from megatron_mdm.environment import ALONE
from megatron_mdm.errors import UserError
from megatron_mdm.experiments.program import program, program_now
from megatron_mdm.files import write_errors, write_json

PROGRAM = ("-m", "megatron_mdm.pretrain")
# The same network, trained to predict next tokens.
AUTOREGRESSIVE = ("-m", "megatron_mdm.experiments.autoregressive")
# Flags whose directories a run reads.
READ_FROM = ("--tokenizer-model", "--load", "--pretrained-checkpoint")
# Held while a thread reads the exit status of child processes; the start of a process reads that of
# all others. If two threads read at once, the second one gets the status 255.
_ASKING = threading.Lock()
ENVIRONMENT = {
    # A run of one rank needs no launcher, which would import torch a second time.
    **ALONE,
    "OMP_NUM_THREADS": "1",
    # By default glibc returns large blocks to the system and requests them again at every step,
    # which takes a quarter of the time.
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
}


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Fields of MDMConfig as flags: {"views": 2} -> ["--mdm-views", "2"]."""
    flags = []
    for key, value in settings.items():
        values = value if isinstance(value, list) else [value]
        flags += [flag_of(key), *map(str, values)]
    return flags


def run_cached(
    directory: pathlib.Path, flags: Sequence[str], work: Callable[[pathlib.Path], dict[str, Any]]
) -> dict[str, Any]:
    """Returns the result of a run from the cache, or executes the run.

    Args:
        directory: directory of the results.
        flags: flags of the run. The name of a run depends on its flags, on the contents of the
            files that they name, and on the program version. If one of these changes, the run is
            executed again.
        work: executes the run if there is no result yet; called with `run_path`.

    Returns:
        The result of `work`, with `flags` and `program`.

    Raises:
        UserError: the program has changed since this process started. The result is not kept.
    """
    name = run_path(directory, flags)
    path = name.with_suffix(".json")
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    result = {"flags": list(flags), "program": program(), **work(name)}
    if program_now() != program():
        raise UserError(
            "the program has changed since these runs began, so the last result may come from "
            "either version and is not kept. Do not change the checkout while runs are going on; "
            f"it was {program()}"
        )
    write_json(str(path), result)
    return result


def run_path(directory: pathlib.Path, flags: Sequence[str]) -> pathlib.Path:
    """Path of a run's files without a suffix; see `run_cached`."""
    words = [
        _with_contents(word, before in READ_FROM and directory not in pathlib.Path(word).parents)
        for before, word in zip(["", *flags], flags, strict=False)
    ]
    return directory / digest("\n".join([program(), *words]))


def _with_contents(word: str, is_read: bool) -> str:
    """Appends a digest of the contents to a word that names a file or a .bin/.idx pair.

    Args:
        word: a word of a command.
        is_read: whether to do the same for a directory. It is not needed for a directory that a
            cached run wrote, because its name already depends on the inputs.
    """
    if is_read and os.path.isdir(word):
        files = sorted(path for path in pathlib.Path(word).rglob("*") if path.is_file())
        return f"{word} {made_from(files, {})}"
    if os.path.isfile(f"{word}.idx") and os.path.isfile(f"{word}.bin"):
        return f"{word} {quick_digest(f'{word}.bin', f'{word}.idx')}"
    return f"{word} {file_digest(word)}" if os.path.isfile(word) else word


def digest(text: str) -> str:
    """A short name for a text: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_parallel[Task, Result](
    jobs: int, work: Callable[[Task], Result], tasks: Sequence[Task]
) -> list[Result]:
    """Executes tasks that wait for `run_python`, several at a time.

    After a failure or an interruption no task is started, and running processes are killed.

    Args:
        jobs: number of tasks at a time.
        work: executes one task, in a thread.
        tasks: the tasks, started in this order.

    Returns:
        The results of `work`, in the order of the tasks.
    """
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    futures = [pool.submit(work, task) for task in tasks]
    try:
        done, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
        for future in done:
            future.result()
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in futures):
            with _ASKING:
                for process in multiprocessing.active_children():
                    process.kill()
            time.sleep(0.1)


def run_python(command: Sequence[str], log: pathlib.Path, name: str) -> str:
    """Runs Python with the given arguments as a single rank.

    The process is a fork of a server. On a machine without a GPU, the server has already imported
    torch and Megatron, which takes longer than a short run. With a GPU it has not, because these
    imports depend on the device. The run ends when the calling process ends, even after a kill.

    Args:
        command: arguments of the interpreter: a file, or -m and a module, then flags.
        log: file for all output.
        name: name of the run in error messages, such as "the run of standard".

    Returns:
        The output.

    Raises:
        UserError: the run failed.
    """
    os.environ.update(ENVIRONMENT)  # set before the server starts; its forks inherit it
    context = multiprocessing.get_context("forkserver")
    if not os.path.exists("/dev/nvidiactl"):
        context.set_forkserver_preload([f"{__package__}.preload"])
    with write_errors(str(log)):
        log.touch()
    process = context.Process(target=_execute, args=(list(command), str(log)))
    with _ASKING:
        process.start()
    try:
        multiprocessing.connection.wait([process.sentinel])
    finally:
        with _ASKING:
            process.join(0)  # a process that has ended gets no signal
            process.kill()
            process.join()
    if process.exitcode:
        raise UserError(f"{name} failed: its output is in {log}{_last_error(log)}")
    return log.read_text(encoding="utf-8")


def _last_error(log: pathlib.Path) -> str:
    """The last error in a log, as the end of a sentence; empty if there is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for pattern in (r"error: (.*)", r"((?:\[rank\d+\]: )?[\w.]*(?:Error|Exception)(?:: .*)?)"):
        for line in reversed(lines):
            if found := re.fullmatch(pattern, line):
                return f", whose last error is: {found[1]}"
    return ""


def iteration_in(log: pathlib.Path) -> str:
    """The last iteration in a training log, such as "iteration 20 of 500"; empty if none."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    found = re.findall(r" iteration +(\d+)/ *(\d+)", text)
    return "iteration {} of {}".format(*found[-1]) if found else ""


def _execute(command: list[str], log: str) -> None:
    end_with_parent()
    output = os.open(log, os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, os.path.dirname(command[0]))
        runpy.run_path(command[0], run_name="__main__")


def end_with_parent() -> None:
    """Starts a thread that ends this process when its parent has ended, even by a kill."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def read_scalars(directory: str) -> dict[str, list[tuple[int, float]]]:
    """All scalars of a TensorBoard directory: name -> list of (step, value), in order of steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(directory, size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
