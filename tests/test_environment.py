"""Checks and settings that come before the imports of torch and Megatron."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_mdm
from megatron_mdm.environment import ALONE, STARTED_TOGETHER, join_ranks
from megatron_mdm.errors import UserError
from tests.mcore.flags.parsing import COMMON


def test_no_module_imports_a_program():
    """A program runs as __main__, so a rank that imports it would hold a second copy.

    A program that is a variant of another may import it, because then the variant runs as __main__.
    """
    package = Path(megatron_mdm.__file__).parent
    programs = re.compile(
        r"^\s*(from|import) megatron_mdm\."
        r"(pretrain|launch|lm_eval\.__main__|experiments\.autoregressive)\b",
        re.M,
    )
    found = [path for path in package.rglob("*.py") if programs.search(path.read_text())]
    assert found == [package / "experiments/autoregressive.py"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2, and LOCAL_RANK is not set: start the"),
        (
            {"SLURM_STEP_NUM_TASKS": "8"},
            "SLURM_STEP_NUM_TASKS is 8, and RANK is not set: start the",
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "2"},
            "OMPI_COMM_WORLD_SIZE is 2, and RANK is not set: start the",
        ),
    ],
)
def test_one_of_several_ranks_that_no_torchrun_started(environment, message, monkeypatch):
    clear_launcher(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        join_ranks()


def test_a_process_that_nobody_launched_is_a_run_of_one_rank(monkeypatch):
    clear_launcher(monkeypatch)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    join_ranks()
    assert {name: os.environ[name] for name in ALONE} == ALONE
    # torchrun under srun, one per node
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("WORLD_SIZE", "16")
    join_ranks()
    assert os.environ["WORLD_SIZE"] == "16"


def clear_launcher(monkeypatch):
    for name in (*ALONE, *STARTED_TOGETHER):
        monkeypatch.setenv(name, "")  # so that a later change is undone
        monkeypatch.delenv(name)


def test_the_program_trains_without_torchrun(tmp_path):
    """This test starts its own process, because all others set the variables that torchrun sets."""
    names = (*ALONE, *STARTED_TOGETHER)
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-m", "megatron_mdm.pretrain", *COMMON, "--mock-data"]
    run = subprocess.run(
        [*command, "--train-iters", "1", "--split", "1,0,0"],
        capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert "iteration        1/       1" in run.stdout
