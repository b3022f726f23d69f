#!/usr/bin/env python3
"""Runs `tools/benchmark.py gpu` for pairs of size and precision, in the given order.

    bench.py --json gpu.json --minutes 4 --profile-of 1B:bf16 -- 1B:bf16 1B:tensorwise

A pair with an entry in the JSON file is not measured again, unless the entry only says that it took
too long. A size of `gpu.LARGEST` is skipped if a larger one has results. The program ends with
exit status 3 before a pair for which too little time is left: less than --least seconds, or less
than 0.85 times the longest pair so far. The other flags are those of the benchmark.
"""

import argparse
import json
import pathlib
import sys
import time

try:
    from benchmarks import gpu
except ImportError as error:
    print(f"the benchmark cannot be imported: {error}", file=sys.stderr)
    sys.exit(9)


def main() -> None:
    """Measures as many pairs as the time allows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="+", metavar="SIZE:PRECISION")
    parser.add_argument("--profile-of", nargs="*", default=[], metavar="SIZE:PRECISION")
    parser.add_argument("--least", type=float, default=45.0, metavar="SECONDS")
    gpu.add_arguments(parser)
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    longest, status = args.least, 0
    for pair in args.pairs:
        size, _, precision = pair.partition(":")
        if not is_wanted(size, precision, kept(args.json)):
            continue
        left = deadline - time.monotonic()
        if left < longest:
            print(f"no time for {pair}: {left:.0f} s left", file=sys.stderr, flush=True)
            status = 3
            break
        begin = time.monotonic()
        settings = {"sizes": [size], "precisions": [precision], "tiny": size in gpu.TINY}
        settings |= {"minutes": left / 60, "profile": pair in args.profile_of}
        try:
            gpu.run(argparse.Namespace(**{**vars(args), **settings}))
        except Exception as error:  # measure the other pairs nevertheless
            print(f"{pair}: {type(error).__name__}: {error}", file=sys.stderr)
            status = 1
        took = time.monotonic() - begin
        print(f"{pair}: {took:.0f} s", file=sys.stderr, flush=True)
        longest = max(longest, 0.85 * took)
    sys.exit(status)


def kept(path: str) -> dict[str, dict]:
    """Reads the measurements so far: "SIZE PRECISION" -> results, or the reason for a failure."""
    file = pathlib.Path(path)
    return json.loads(file.read_text("utf-8"))["measurements"] if file.exists() else {}


def is_wanted(size: str, precision: str, done: dict[str, dict]) -> bool:
    """Whether a pair still has to be measured."""
    larger = gpu.LARGEST[: gpu.LARGEST.index(size)] if size in gpu.LARGEST else ()
    if any("sides" in done.get(f"{x} {precision}", {}) for x in larger):
        return False
    before = done.get(f"{size} {precision}")
    return before is None or "took longer" in before.get("failed", "")


if __name__ == "__main__":
    main()
