"""Command line of tools/benchmarks: one subcommand per module."""

import argparse

from benchmarks import gpu, preprocessing, race, throughput, variance
from megatron_mdm.errors import run_tool

# Worker processes import this file: the modules leave imports such as torch to their functions.
BENCHMARKS = {
    "data": preprocessing,
    "gpu": gpu,
    "race": race,
    "throughput": throughput,
    "variance": variance,
}

EXAMPLES = """\
example:
  python tools/benchmark.py data --mb 16 --json data.json
  python tools/benchmark.py throughput --json throughput.json
  python tools/benchmark.py throughput --sides hugging_face full_head masked_head
  python tools/benchmark.py gpu --json gpu.json
  python tools/benchmark.py variance --quick
  python tools/benchmark.py race --jobs 2 --json race.json
"""


def main() -> None:
    """Hands over to the subcommand."""
    parser = argparse.ArgumentParser(
        description="Measure this package on this machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="BENCHMARK", required=True)
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(
            name,
            help=module.DESCRIPTION,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_tool(main)
