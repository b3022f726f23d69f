#!/usr/bin/env python3
"""Prints the main results of a stage: `figures.py STAGE LOG STATE_DIRECTORY`."""

import json
import pathlib
import re
import sys
from collections import Counter

WIDTH, MOST = 230, 25


def of_checks(log: str, _: pathlib.Path) -> list[str]:
    """Returns every check, and the attention kernels that Transformer Engine chose."""
    chosen = sorted(set(re.findall(r"Selected backend = (.*)", log)))
    return re.findall(r"^CHECK (.*)$", log, re.M) + [f"attention: {name}" for name in chosen]


def of_training(log: str, state: pathlib.Path) -> list[str]:
    """Returns which way of training works, and the first and last losses."""
    lines = re.findall(r"^(?:TRAINS|FAILS) .*$", log, re.M)
    for name in ("train-bf16", "train-fp8"):
        path = state / "logs" / f"{name}.log"
        if not path.exists():
            continue
        text = path.read_text("utf-8", errors="replace")
        losses = [float(x) for x in re.findall(r"mdm loss: ([\d.E+-]+)", text)]
        # From the lines of Megatron's log, otherwise from this package's own lines.
        losses = losses or [float(x) for x in re.findall(r"mdm iteration .*? loss: ([\d.]+)", text)]
        if losses:
            ends = " ".join(f"{loss:.3f}" for loss in losses[:3] + losses[-3:])
            lines.append(
                f"{name}: {len(losses)} losses {ends}; "
                f"tokens/s {last(r'tokens/s: ([\d.]+)', text)}, "
                f"NELBO {last(r'validation NELBO: ([\d.]+)', text)}, "
                f"ms of fusions at the start {last(r'jit-fusion-options[^(]*\(([\d.]+),', text)}"
            )
    return lines


def last(pattern: str, text: str) -> str:
    """Returns the last match of a pattern, or a dash."""
    return ([*re.findall(pattern, text)] or ["-"])[-1]


def of_bench(log: str, _: pathlib.Path) -> list[str]:
    """Returns the rows of the last table, and the time of each pair."""
    table = re.split(r"^size +precision.*$", log, flags=re.M)
    rows = re.findall(r"^[\w.]+ +\w+ .*$", table[-1], re.M) if len(table) > 1 else []
    return rows + re.findall(r"^(?:no time for .*|[\w.]+:\w+: .*)$", log, re.M)


def of_tests(log: str, _: pathlib.Path) -> list[str]:
    """Returns the number of tests by outcome, and the reasons of failures, over all calls."""
    words = "PASSED|FAILED|ERROR|SKIPPED"
    ends = {name: end for end, name in re.findall(rf" ({words}) (tests/\S+::.*?) *$", log, re.M)}
    counts = Counter(ends.values())
    lines = [", ".join(f"{counts[word]} {word.lower()}" for word in words.split("|"))]
    why = dict(re.findall(r"^(?:FAILED|ERROR) (tests/\S+::.*?) - (.*)$", log, re.M))
    lines += re.findall(r"^=+ (.* in [\d.]+s.*?) =+$", log, re.M)[-1:]
    return lines + [
        f"{end} {name} - {why.get(name, '')[:150]}"
        for name, end in ends.items()
        if end in ("FAILED", "ERROR")
    ]


def of_throughput(_: str, state: pathlib.Path) -> list[str]:
    """Returns tokens/s and memory of each side."""
    path = state / "throughput.json"
    if not path.exists():
        return []
    results = json.loads(path.read_text("utf-8"))
    return [
        f"{side}: {values['tokens_per_s']:.0f} tokens/s, ratio "
        f"{results['tokens_per_s_ratios'].get(side, {'median': 1.0})['median']:.3f}, step "
        f"{(values['peak_bytes'] or 0) / 1e9:.2f} GB"
        for side, values in results["sides"].items()
    ]


def of_install(log: str, _: pathlib.Path) -> list[str]:
    """Returns what was kept of Transformer Engine's library, and errors."""
    return re.findall(r"^(?:kept|pip failed|ERROR).*$", log, re.M)


FIGURES = {
    "install": of_install,
    "train": of_training,
    "tests": of_tests,
    "throughput": of_throughput,
    **dict.fromkeys(("smoke", "te", "all-kernels"), of_checks),
    **dict.fromkeys(("bench", "large", "half"), of_bench),
}


def main() -> None:
    """Prints the results of the last run of a stage; for `tests`, those of all runs."""
    stage, log, state = sys.argv[1:]
    text = pathlib.Path(log).read_text("utf-8", errors="replace")
    if stage != "tests":
        text = text[max(0, text.rfind(f"===== {stage},")) :]
    for line in FIGURES.get(stage, of_install)(text, pathlib.Path(state))[:MOST]:
        print(f"    {line[:WIDTH]}")


if __name__ == "__main__":
    main()
