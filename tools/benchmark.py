"""Measures this package on this machine: one subcommand for each module of tools/benchmarks.

    python tools/benchmark.py variance --quick

`python tools/benchmark.py NAME --help` says more.
"""

import argparse

from benchmarks import decoding, gpu, parallel, preprocessing, race, soak, throughput, variance
from megatron_mdm.errors import run_tool

# Worker processes import this file, so the modules import torch and the like in functions only.
BENCHMARKS = {
    "data": preprocessing,
    "decoding": decoding,
    "gpu": gpu,
    "parallel": parallel,
    "race": race,
    "soak": soak,
    "throughput": throughput,
    "variance": variance,
}
# A first command for each, which its help begins with.
EXAMPLES = {
    "data": ["data --mb 16 --json data.json"],
    "decoding": ["decoding --load runs/quickstart/checkpoint --device cpu --json decoding.json"],
    "gpu": ["gpu --json gpu.json"],
    "parallel": [
        "parallel --json parallel.json",
        "parallel --report parallel.json --figure parallel.png",
    ],
    "race": ["race --jobs 2 --json race.json"],
    "soak": ["soak --json soak.json"],
    "throughput": [
        "throughput --json throughput.json",
        "throughput --sides hugging_face full_head masked_head",
    ],
    "variance": ["variance --quick"],
}


def main() -> None:
    """Hands over to the subcommand."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="BENCHMARK", required=True)
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(
            name,
            help=module.DESCRIPTION,
            description=description(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args()
    args.run(args)


def description(name: str) -> str:
    """The docstring of a benchmark, with its examples after the first paragraph."""
    first, _, rest = (BENCHMARKS[name].__doc__ or "").partition("\n\n")
    examples = "\n".join(f"    python tools/benchmark.py {words}" for words in EXAMPLES[name])
    return f"{first}\n\n{examples}\n\n{rest}"


if __name__ == "__main__":
    run_tool(main)
