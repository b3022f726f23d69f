"""Rehearses a launch on this machine's CPU, before a cluster starts it.

    python -m megatron_mdm.rehearse --nodes 16 --gpus-per-node 8 --without-inputs 128 -- \
        --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 \
        --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 256 \
        --train-iters 10 --lr 1e-3 --eval-interval 10 --eval-iters 1

The flags of the launch come after --. For each kind of rank one process checks the flags and files
as the rank would, builds its stage at full size without weights, reads its rows, and takes two
steps and an evaluation with a narrower model. The program prints what a rank needs and how long the
run takes. It ends with status 0 if the launch is accepted, and with 2 and one line if not.
"""

import argparse
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

from megatron_mdm.environment import check_megatron_version
from megatron_mdm.errors import BAD_INPUT, UserError, check_numbers, escaped, run_tool
from megatron_mdm.experiments.runs import end_with_parent
from megatron_mdm.rehearse.flags import for_a_cpu, missing_inputs, without_inputs
from megatron_mdm.rehearse.report import Speed, as_json, lines, verdict
from megatron_mdm.rehearse.roles import Role, roles
from megatron_mdm.sizing.nodes import Layout, check_nodes

H100_TFLOPS = 989  # dense, bfloat16, SXM: NVIDIA's data sheet
PRELOADED = ["megatron_mdm.experiments.preload", "megatron_mdm.rehearse.rank"]
LAST_LINES = 20  # of the output of a rank that failed


def main() -> None:
    """Rehearses the launch of the command line.

    Raises:
        UserError: the launch would not start; the message names the role.
    """
    options = _parser().parse_args()
    check_numbers(options, "nodes", "gpus_per_node", "jobs", "without_inputs")
    if not 0.0 < options.mfu <= 1.0:
        raise UserError(f"--mfu {options.mfu:g}: must lie in (0, 1]")
    if not options.peak_tflops > 0:
        raise UserError(f"--peak-tflops {options.peak_tflops:g}: must be above 0")
    check_megatron_version()
    given: list[str] = options.flags[1:] if options.flags[:1] == ["--"] else options.flags
    if options.without_inputs is not None:
        given = without_inputs(given, options.without_inputs)
    elif missing := missing_inputs(given):
        raise UserError(
            f"these files do not exist: {', '.join(missing)}. Make them, or rehearse with "
            "--without-inputs VOCABULARY"
        )
    layout = Layout.from_flags(given)
    check_nodes(layout, options.nodes, options.gpus_per_node)
    words, left_out = for_a_cpu(given)
    played = roles(layout, options.nodes, options.gpus_per_node, words)
    speed = Speed(options.mfu, options.peak_tflops)
    found = play_all(words, played, options.jobs)
    if options.json:
        print(json.dumps(as_json(found, left_out, speed), indent=2))
    result = verdict(found)
    if not result["accepted"]:
        line = f"{result['role']}: {result.get('refusal') or result['failure']}"
        if not options.json:
            raise UserError(line)
        sys.exit(BAD_INPUT)
    if not options.json:
        for line in lines(found, left_out, speed):
            print(escaped(line))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_mdm.rehearse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nodes", type=int, required=True, metavar="N", help="nodes of the launch")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a node (default: 8)")
    add(
        "--without-inputs", type=int, metavar="N",
        help="random rows and a tokenizer of N ids take the place of data and tokenizer",
    )  # fmt: skip
    add("--mfu", type=float, default=0.4, help="assumed model FLOPs utilisation (default: 0.4)")
    add(
        "--peak-tflops", type=float, default=H100_TFLOPS, metavar="X",
        help="dense peak of one GPU, TFLOP/s (default: 989, H100 SXM in bfloat16)",
    )  # fmt: skip
    add("--json", action="store_true", help="print one JSON object")
    add(
        "--jobs", type=int, default=min(4, os.cpu_count() or 1), metavar="N",
        help="ranks that are played at a time (default: the number of CPUs, at most 4)",
    )  # fmt: skip
    add("flags", nargs=argparse.REMAINDER, metavar="-- FLAGS", help="all flags of the launch")
    return parser


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
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the processes
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as directory:
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
    output = os.open(file, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from megatron_mdm.rehearse.rank import report

    found = report(words, role)
    Path(file).with_suffix(".result").write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # the fake process groups have nothing to end


if __name__ == "__main__":
    run_tool(main)
