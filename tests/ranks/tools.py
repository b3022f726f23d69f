"""Starts tools as users do or in forks, and defines how several ranks of a tool start."""

import logging
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tests import ROOT
from tests.ranks import server

TIMEOUT = 180  # seconds; most tools here take about 2
TAIL = 4000  # characters of output that a failure shows
# Two ranks on any free port. It also works where the machine's own name cannot be resolved.
TORCHRUN = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2".split()


def users_environment() -> dict[str, str]:
    """The environment in which the tests were started, before torch.compile was switched off."""
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_COMPILE_DISABLE"}
    given = environment.get("MDM_TEST_COMPILE_DISABLE")
    return environment | ({"TORCH_COMPILE_DISABLE": given} if given else {})


def run_tool(name: str, *flags: str) -> str:
    """Starts a tool of tools/ on one rank, as users do, and returns its stdout."""
    result = subprocess.run(
        [sys.executable, f"tools/{name}.py", *flags],
        cwd=ROOT,
        env=users_environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-TAIL:]
    return result.stdout


def run_forked(
    file: str, *flags: str, without: Iterable[str] = (), directory: Path = ROOT
) -> subprocess.CompletedProcess:
    """Runs a program of the project on one rank, in a fork of the warm process.

    The fork has the imports of the tests and the environment of the calling test. `run_tool` and
    subprocess start a program as users do, which takes seconds longer.

    Args:
        file: path of the program in the project.
        flags: its command line after the file.
        without: packages that the program finds not installed.
        directory: working directory of the program, in which the path of the file is valid too.
    """
    with tempfile.TemporaryDirectory() as logs:
        words, environment = [file, *flags], dict(os.environ)
        process = server.context().Process(
            target=_run_file, args=(words, environment, list(without), logs, directory)
        )
        process.start()
        process.join(TIMEOUT)
        process.kill()
        process.join()
        output, errors = (Path(logs, name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(words, process.exitcode, output, errors)


def _run_file(
    words: list[str],
    environment: dict[str, str],
    without: list[str],
    logs: str,
    directory: Path,
) -> None:
    for number, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(os.path.join(logs, name), os.O_WRONLY | os.O_CREAT), number)
    # While it is imported, Megatron sets up a log handler on the current stdout. In a tool's own
    # process that is stderr, because `open_checkpoint` imports Megatron and keeps stdout for the
    # tool.
    for handler in logging.root.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)
    os.environ |= environment
    os.chdir(directory)
    sys.modules.update(dict.fromkeys(without))
    sys.argv = words
    sys.path.insert(0, os.path.dirname(words[0]))
    runpy.run_path(words[0], run_name="__main__")


def fit_ppots(load: str | Path, output: Path, *flags: str) -> str:
    """Runs tools/fit_ppots.py on a checkpoint, which writes `output`, and returns its stdout."""
    where = ["--device", "cpu", "--load", str(load), "--output", str(output)]
    run = run_forked("tools/fit_ppots.py", *where, *flags)
    assert run.returncode == 0, run.stderr[-TAIL:]
    return run.stdout
