"""Tools and launchers that tests start as users do, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

from tests import ROOT

TAIL = 4000  # characters of output that a failure shows
# Two ranks on any free port, also where the machine's own name cannot be resolved.
TORCHRUN = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2".split()


def users_environment() -> dict[str, str]:
    """The environment in which the tests were started, where torch.compile is not switched off."""
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_COMPILE_DISABLE"}
    given = environment.get("MDM_TEST_COMPILE_DISABLE")
    return environment | ({"TORCH_COMPILE_DISABLE": given} if given else {})


def run_tool(name: str, *flags: str) -> str:
    """What one of tools/ prints, started as users do, on one rank."""
    result = subprocess.run(
        [sys.executable, f"tools/{name}.py", *flags],
        cwd=ROOT,
        env=users_environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-TAIL:]
    return result.stdout


def fit_ppots(load: str | Path, output: Path, *flags: str) -> str:
    """What tools/fit_ppots.py prints about its fit to a checkpoint, which it writes to `output`."""
    where = ["--device", "cpu", "--load", str(load), "--output", str(output)]
    return run_tool("fit_ppots", *where, *flags)
