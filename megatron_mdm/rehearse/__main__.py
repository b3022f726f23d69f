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
import os
import sys

from megatron_mdm.errors import BAD_INPUT, UserError, check_numbers, escaped, run_tool
from megatron_mdm.rehearse.flags import for_a_cpu, missing_inputs, without_inputs
from megatron_mdm.rehearse.processes import play_all
from megatron_mdm.rehearse.report import Speed, as_json, lines, verdict
from megatron_mdm.rehearse.roles import roles
from megatron_mdm.sizing.nodes import Layout, check_nodes
from megatron_mdm.versions import check_megatron

H100_TFLOPS = 989  # dense, bfloat16, SXM: NVIDIA's data sheet


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
    check_megatron()
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
    found = play_all(words, given, played, options.jobs)
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


if __name__ == "__main__":
    run_tool(main)
