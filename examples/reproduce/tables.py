"""From the results of all runs to tables, verdicts and a figure; puts them into Markdown files.

One rule decides what is said of a method: its differences from `standard`, one for each seed, have
a mean and a 95% interval of Student's t. It gains or loses where the interval leaves out 0;
anywhere else there is no clear difference.
"""

import math
import pathlib
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from methods import DOUBLED, LONGER, METHODS, SCALES, SHORTER, Task, own_epochs

from megatron_mdm.errors import UserError
from megatron_mdm.files import complete_or_absent, write_errors, write_text

Run = dict[str, Any]
VIEWS = [f"{name}, equal epochs" for name in METHODS if True in own_epochs(name)]


class Section(NamedTuple):
    """A table: its entries (see `Task.entry`), and those that the others are compared with."""

    title: str
    entries: list[str]
    baselines: list[str]


SECTIONS = (
    Section("equal rows", list(METHODS), ["standard"]),
    Section("equal epochs", ["standard", *VIEWS, DOUBLED], ["standard", DOUBLED]),
    Section("other lengths", ["standard", LONGER, SHORTER, "autoregressive"], ["standard"]),
)
ENTRIES = list(dict.fromkeys(entry for section in SECTIONS for entry in section.entries))


class Estimate(NamedTuple):
    """A mean over seeds, and half of its 95% interval of Student's t."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """From one value a seed; of a single one nothing is known."""
        from scipy.stats import t

        n = len(values)
        half = math.inf
        if n > 1:
            half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
        return cls(statistics.mean(values), half)

    def verdict(self) -> str:
        """What it says of a method, as a difference of answers from those of `standard`."""
        if self.mean == self.half == 0.0:
            return "the same"
        if abs(self.mean) <= self.half:
            return "no clear difference"
        return "gains" if self.mean > 0 else "loses"

    def text(self, form: str) -> str:
        """In a format such as "+.1f"; without an interval from a single seed."""
        half = f" +- {self.half:{form.lstrip('+')}}" if math.isfinite(self.half) else ""
        return f"{self.mean:{form}}{half}"


def difference(runs: Sequence[Run], baseline: Sequence[Run], key: str) -> Estimate | None:
    """Of the runs from those of the baseline with the same seed; None if there are none."""
    base = {run["seed"]: run[key] for run in baseline}
    pairs = [run[key] - base[run["seed"]] for run in runs if run["seed"] in base]
    return Estimate.of(pairs) if pairs else None


def gradient(runs: Sequence[Run], entry: str, baseline: str = "standard") -> list[float]:
    """Variance of a gradient relative to a baseline's, one value a seed, where it was measured."""
    measured = [run["noise"] for run in runs if run.get("noise", {}).keys() >= {entry, baseline}]
    return [values[entry] / values[baseline] for values in measured]


def by_entry(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each entry of the tables, in their order."""
    found: dict[str, list[Run]] = {entry: [] for entry in ENTRIES}
    for run in runs:
        found[Task(run["method"], run["seed"], run["epochs"]).entry].append(run)
    return {entry: some for entry, some in found.items() if some}


def mean_percent(runs: Sequence[Run], key: str) -> str:
    """A mean over seeds."""
    return f"{statistics.mean(100 * run[key] for run in runs):.1f}%"


def spread(runs: Sequence[Run]) -> str:
    """Largest minus least share of answers, in points."""
    answers = [100 * run["answers"] for run in runs]
    return f"{max(answers) - min(answers):.1f}" if len(runs) > 1 else "-"


def as_text(results: dict[str, Any]) -> str:
    """All tables, each with its differences from the baselines and the verdicts on answers."""
    runs = by_entry(results["runs"])
    blocks = []
    for section in SECTIONS:
        found = {entry: runs[entry] for entry in section.entries if entry in runs}
        lines = [
            f"{section.title:30s}{'answers':>8s}{'max - min':>11s}{'std':>6s}{'all steps':>11s}"
            f"{'NELBO':>9s}{'rows':>9s}{'seeds':>7s}"
        ]
        for entry, some in found.items():
            answers = [100 * run["answers"] for run in some]
            std = f"{statistics.stdev(answers):.1f}" if len(some) > 1 else "-"
            nelbo = statistics.mean(run["nelbo"] for run in some)
            lines.append(
                f"{entry:30s}{mean_percent(some, 'answers'):>8s}{spread(some):>11s}{std:>6s}"
                f"{mean_percent(some, 'solutions'):>11s}{nelbo:9.4f}{some[0]['rows']:9d}"
                f"{len(some):7d}"
            )
        blocks.append(lines)
        blocks += [_differences(results["runs"], found, name) for name in section.baselines]
    return "\n\n".join("\n".join(lines) for lines in blocks if len(lines) > 1)


def _differences(runs: list[Run], found: dict[str, list[Run]], baseline: str) -> list[str]:
    lines = [
        f"{'minus ' + baseline:30s}{'answers':>15s}{'all steps':>15s}{'NELBO':>20s}"
        f"{'gradient':>15s}  verdict on answers"
    ]
    for entry, some in found.items():
        base = [] if entry == baseline else found.get(baseline, [])
        answers, steps, nelbo = (
            difference(some, base, key) for key in ("answers", "solutions", "nelbo")
        )
        if answers and steps and nelbo:
            lines.append(
                f"{entry:30s}{points(answers):>15s}{points(steps):>15s}{nelbo.text('+.4f'):>20s}"
                f"{noise(runs, entry, baseline) or '-':>15s}  {answers.verdict()}"
            )
    return lines


def noise(runs: Sequence[Run], entry: str, baseline: str = "standard") -> str:
    """Relative variance of the gradient; empty if it was not measured."""
    values = gradient(runs, entry, baseline)
    return Estimate.of(values).text(".2f") if values else ""


def points(share: Estimate) -> str:
    """A difference of shares in percentage points."""
    return Estimate(100 * share.mean, 100 * share.half).text("+.1f")


def as_markdown(results: dict[str, Any]) -> str:
    """One table, for a page that says no more."""
    runs = by_entry(results["runs"])
    lines = [
        "| | answers, max - min | all steps | NELBO | answers minus `standard`'s | gradient |",
        "|---|---|---|---|---|---|",
    ]
    for entry, some in runs.items():
        less = difference(some, runs.get("standard", []), "answers")
        cells = [
            entry,
            f"{mean_percent(some, 'answers')}, {spread(some)}",
            mean_percent(some, "solutions"),
            f"{statistics.mean(run['nelbo'] for run in some):.4f}",
            f"{points(less)}: {less.verdict()}" if less and entry != "standard" else "",
            noise(results["runs"], entry),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def caption(results: dict[str, Any]) -> str:
    """Where the results come from."""
    runs = results["runs"]
    done = sorted({run["seed"] for run in runs})
    seeds, missing = ", ".join(map(str, done)), len(SCALES[results["scale"]].seeds) - len(done)
    seeds += f" ({missing} more have not been run)" if missing > 0 else ""
    hours = sum(run["seconds"] for run in runs) / 3600
    return (
        f"`--scale {results['scale']}`, seeds {seeds}, {runs[0]['problems']} problems, "
        f"{results['machine']}, {results['date']}; {len(runs)} fine-tunings of {hours:.1f} hours "
        f"in all, {results['jobs']} at a time."
    )


def insert(results: dict[str, Any], path: str) -> None:
    """Replaces what stands between `<!-- reproduce: NAME -->` and `<!-- end -->` in a file.

    Raises:
        UserError: the file cannot be read or written, or has no such place.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--insert {path}: cannot be read ({error})") from error
    write_text(path, inserted(results, text, path))


PLACE = re.compile(r"(<!-- reproduce: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def inserted(results: dict[str, Any], text: str, path: str) -> str:
    """The text of a file with the results in their places; see `insert`."""
    blocks: dict[str, Callable[[dict[str, Any]], str]] = {
        "caption": caption,
        "summary": as_markdown,
        "tables": lambda results: f"```text\n{as_text(results)}\n```",
    }
    if not {name for _, name, _ in PLACE.findall(text)} & set(blocks):
        raise UserError(
            f"--insert {path}: has no <!-- reproduce: NAME --> with an <!-- end -->, and NAME of "
            f"{', '.join(blocks)}"
        )

    def replacement(match: re.Match[str]) -> str:
        if match[2] not in blocks:
            return match[0]
        return f"{match[1]}{blocks[match[2]](results)}\n{match[3]}"

    return PLACE.sub(replacement, text)


def draw(results: dict[str, Any], path: str) -> None:
    """Answers of every run, and the variance of every method's gradient."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for place, entry in enumerate(ENTRIES):
        answers = [100 * run["answers"] for run in by_entry(results["runs"]).get(entry, [])]
        for axes, values in ((left, answers), (right, gradient(results["runs"], entry))):
            if values:
                axes.plot(values, [-place] * len(values), "o", color="C0", ms=4, alpha=0.6)
                axes.plot([statistics.mean(values)], [-place], "|", color="C0", ms=16, mew=2)
    left.set(xlabel="right answers (%)", yticks=[-i for i in range(len(ENTRIES))])
    left.set_ylim(0.5 - len(ENTRIES), 0.5)
    left.set_yticklabels(ENTRIES)
    right.set(xlabel="variance of a batch's gradient, relative to standard", xscale="log")
    right.axvline(1.0, color="0.6", lw=0.8)
    with complete_or_absent(path) as (temporary,), write_errors(path):
        figure.savefig(temporary, dpi=100, format=path.rpartition(".")[2])
    plt.close(figure)
