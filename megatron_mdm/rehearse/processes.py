"""Plays roles in processes, which are forks of a server that has imported Megatron once."""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_mdm.errors import escaped
from megatron_mdm.experiments.runs import end_with_parent
from megatron_mdm.files import termination_raises
from megatron_mdm.rehearse.report import verdict
from megatron_mdm.rehearse.roles import Role

PRELOADED = ["megatron_mdm.experiments.preload", "megatron_mdm.rehearse.rank"]
LAST_LINES = 20  # of the output of a rank that failed


def play_all(
    words: Sequence[str], played: Sequence[Role], jobs: int
) -> list[tuple[Role, dict[str, Any]]]:
    """Plays roles, each in its own process; ends after the first one if that is refused.

    The first role comes first, because it builds the index of the data that the others read.

    Args:
        words: flags of `for_a_cpu`.
        played: the roles.
        jobs: processes at a time.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}  # of the processes
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with termination_raises(), tempfile.TemporaryDirectory(prefix="rehearsal-") as directory:
        own = [*words, "--data-cache-path", f"{directory}/cache"]

        def work(role: Role) -> tuple[Role, dict[str, Any]]:
            return role, _play(context, own, role, Path(directory, str(role.rank)))

        found = [work(played[0])]
        if verdict(found)["accepted"]:
            with ThreadPoolExecutor(jobs) as pool:
                found += pool.map(work, played[1:])
    return found


def _play(context: Any, words: list[str], role: Role, file: Path) -> dict[str, Any]:
    """Plays a role in a process of its own, whose output goes to a file."""
    start = time.monotonic()
    process = context.Process(target=_in_process, args=(words, role, str(file)), daemon=True)
    process.start()
    process.join()
    result = file.with_suffix(".result")
    if not result.exists():
        return {"failure": f"the process ended with status {process.exitcode}"}
    found: dict[str, Any] = json.loads(result.read_bytes())
    if "failure" in found:  # not a refusal, so the cause is in the output
        log = file.read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(map(escaped, log[-LAST_LINES:])), file=sys.stderr)
    return {**found, "seconds": time.monotonic() - start}


def _in_process(words: list[str], role: Role, file: str) -> None:
    end_with_parent()
    output = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from megatron_mdm.rehearse.rank import report

    found = report(words, role)
    Path(file).with_suffix(".result").write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # the fake process groups have nothing to end
