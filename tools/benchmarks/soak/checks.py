"""The checks of a soak: losses, memory, files."""

import pathlib
import re
from typing import Any

import numpy as np

from benchmarks.soak.plan import COMPARED
from megatron_mdm.experiments.runs import read_scalars

# Scalars that may not depend on interruptions: the loss of each step, the share that a bell which
# fades leaves to the uniform density, and what P-POTS fits.
_TAGS = re.compile(r"mdm loss|grad-norm|mdm/validation NELBO|mdm/uniform share|mdm/density.*")
LOSS = "mdm loss"
CLOSE = 1e-5  # relative difference of two layouts
# Anonymous memory of a process over the last half of the uninterrupted run, in KiB per 1,000 steps.
FLAT = 64.0
FEWEST_SAMPLES = 20

Scalars = dict[str, dict[int, float]]


def scalars_of(directory: pathlib.Path) -> tuple[Scalars, list[str]]:
    """Scalars of a run of several starts: (tag -> iteration -> value, contradictions).

    A resumed run repeats the iterations since its checkpoint. They have to repeat their values,
    bit for bit.

    Args:
        directory: the run's TensorBoard directory, with one file of events for each start.
    """
    found: Scalars = {}
    wrong = []
    for path in sorted(directory.glob("events.*")):
        for tag, values in read_scalars(str(path)).items():
            known = found.setdefault(tag, {}) if _TAGS.fullmatch(tag) else {}
            for iteration, value in values:
                if known.setdefault(iteration, value) != value:
                    wrong.append(f"{tag}, iteration {iteration}: {known[iteration]}, then {value}")
    return {tag: values for tag, values in found.items() if values}, wrong


def unequal(ours: Scalars, theirs: Scalars, last: int) -> list[str]:
    """Scalars up to iteration `last` that one of two runs lacks, or that differ in any bit."""
    return [
        f"{tag}, iteration {iteration}: {ours.get(tag, {}).get(iteration)}, not {value}"
        for tag, values in theirs.items()
        for iteration, value in values.items()
        if iteration <= last and ours.get(tag, {}).get(iteration) != value
    ]


def difference(ours: Scalars, theirs: Scalars, after: int) -> float:
    """Largest relative difference of the loss in the `COMPARED` iterations after this one.

    Raises:
        KeyError: one of the runs lacks an iteration.
    """
    steps = range(after + 1, after + COMPARED + 1)
    return max(abs(ours[LOSS][i] - theirs[LOSS][i]) / abs(theirs[LOSS][i]) for i in steps)


def missing(scalars: Scalars, iterations: int) -> list[int]:
    """Iterations without a loss."""
    return sorted(set(range(1, iterations + 1)) - set(scalars.get(LOSS, {})))


def slopes(samples: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Growth of memory over the last half of a run, by role; empty if it was too short.

    Samples after the last iteration do not count, because workers end there.

    Args:
        samples: see `job.Start`.

    Returns:
        Role -> KiB per 1,000 steps (least squares), and MiB at the middle and at the end.
    """
    last = samples[-1]["iteration"] if samples else 0
    late = [sample for sample in samples if last / 2 <= sample["iteration"] < last]
    found = {}
    for role in sorted({role for sample in late for role in sample} - {"iteration"}):
        points = [(s["iteration"], s[role]) for s in late if role in s]
        if len(points) >= FEWEST_SAMPLES:
            x, y = np.array(points, float).T
            slope = float(np.polyfit(x / 1000, y / 2**10, 1)[0])
            found[role] = {"slope": slope, "middle": y[0] / 2**20, "end": y[-1] / 2**20}
    return found


def files_under(directory: pathlib.Path) -> dict[str, int]:
    """Number and bytes of the files under a directory."""
    sizes = [path.lstat().st_size for path in directory.rglob("*") if not path.is_dir()]
    return {"files": len(sizes), "bytes": sum(sizes)}


def stray(checkpoints: pathlib.Path, interval: int) -> list[str]:
    """Names under --save that are neither the latest checkpoint nor one to keep, nor beside them.

    Args:
        checkpoints: --save.
        interval: --save-retain-interval.
    """
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    latest = int(tracker.read_text()) if tracker.exists() else -1
    names = []
    for path in sorted(checkpoints.iterdir() if checkpoints.exists() else ()):
        if found := re.fullmatch(r"iter_(\d+)", path.name):
            iteration = int(found[1])
            if iteration == latest or (iteration % interval == 0 and iteration < latest):
                continue
        elif path == tracker:
            continue
        names.append(path.name)
    return names
