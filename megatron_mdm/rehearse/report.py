"""A rehearsal in words."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_mdm.rehearse.roles import Role
from megatron_mdm.sizing.course import MASKED, Course
from megatron_mdm.sizing.memory import GIB

PURPOSES = ("weights", "gradients", "optimizer", "activations", "head")


@dataclass(frozen=True)
class Speed:
    """The assumed speed of a GPU.

    Attributes:
        mfu: model FLOPs utilisation, from 0 to 1.
        peak_tflops: dense peak of one GPU, 1e12 operations per second.
    """

    mfu: float
    peak_tflops: float


def verdict(found: list[tuple[Role, dict[str, Any]]]) -> dict[str, Any]:
    """Whether the launch is accepted, and else the role and the line that refuse it.

    Args:
        found: results of `rehearse.rank.report`, by role.
    """
    for role, result in found:
        for kind in ("refusal", "failure"):
            if kind in result:
                return {"accepted": False, "role": role.name, kind: result[kind]}
    return {"accepted": True}


def as_json(
    found: list[tuple[Role, dict[str, Any]]], left_out: list[str], speed: Speed
) -> dict[str, Any]:
    """The rehearsal as a dict that JSON can hold."""
    summary = {**verdict(found), "not_rehearsed": left_out}
    if summary["accepted"]:
        first, result = found[0]
        course = Course(**result["course"])
        summary |= {
            "gpus": first.world,
            "hours": course.hours(first.world, speed.mfu, speed.peak_tflops * 1e12),
            "mfu": speed.mfu,
            "peak_tflops": speed.peak_tflops,
        }
    roles = [{"name": role.name, "rank": role.rank, **result} for role, result in found]
    return {**summary, "roles": roles}


def lines(
    found: list[tuple[Role, dict[str, Any]]], left_out: list[str], speed: Speed
) -> Iterator[str]:
    """The lines about an accepted launch.

    Args:
        found: results of `rehearse.rank.report`, by role; none is refused.
        left_out: flags that were not rehearsed, with their values.
        speed: assumed speed of a GPU.
    """
    first, result = found[0]
    course = Course(**result["course"])
    yield f"accepted: {first.world:,} ranks; rehearsed:"
    for role, one in found:
        yield f"  {role.name}: start, rows, stage and {one['steps']} steps, {one['seconds']:.0f} s"
    yield (
        f"The steps had a model {result['factor']} times narrower in float32, rows of "
        f"{result['positions']} positions and {_counted(result['rehearsed_micro_batches'])}. "
        "Nothing was loaded or saved."
    )
    if any(one["stand_in_attention"] for _, one in found):
        yield (
            "Under context parallelism the attention was one of each rank's own positions, which "
            "stands in for Transformer Engine's."
        )
    if left_out:
        yield f"not rehearsed: {' '.join(left_out)}"
    yield ""
    yield from _memory(found)
    yield ""
    yield from _step(result, course)
    yield from _epochs(result, course)
    yield from _time(course, first.world, speed)
    yield from _disk(course)


def _memory(found: list[tuple[Role, dict[str, Any]]]) -> Iterator[str]:
    yield "GiB of a GPU, expected at full width, all tokens of a micro-batch masked:"
    names = ("stage", "parameters", *PURPOSES, "all")
    yield "  " + " ".join(f"{name:>11}" for name in names)
    stages = {role.stage: result for role, result in reversed(found)}
    for stage, result in sorted(stages.items()):
        sizes = [result["bytes"][name] for name in PURPOSES]
        parameters = result["stage"]["dense"] + result["stage"]["experts"]
        values = (f"{size / GIB:.1f}" for size in (*sizes, sum(sizes)))
        yield "  " + " ".join(f"{value:>11}" for value in (stage, f"{parameters:,}", *values))


def _step(result: dict[str, Any], course: Course) -> Iterator[str]:
    schedule = "" if course.iterations else ", at the end of --step-batch-size-schedule"
    micro, bubble = result["micro_batches"], result["bubble"]
    yield (
        f"an iteration{schedule}: {course.rows:,} rows of {course.texts:,} texts, "
        f"{course.tokens:,} tokens; {_counted(micro)} a rank, pipeline bubble {bubble:.1%}"
    )


def _counted(micro_batches: int) -> str:
    return f"{micro_batches} micro-batch{'es' if micro_batches > 1 else ''}"


def _epochs(result: dict[str, Any], course: Course) -> Iterator[str]:
    views = course.rows // course.texts
    for path, share, of_epoch in result.get("epochs", ()):
        yield (
            f"data {path}: {share * views:,.0f} rows, {share / of_epoch:.2f} epochs of "
            f"{of_epoch:,} texts"
        )
    if "epochs" not in result:
        yield "data: random rows, so the epochs are unknown"


def _time(course: Course, gpus: int, speed: Speed) -> Iterator[str]:
    hours = course.hours(gpus, speed.mfu, speed.peak_tflops * 1e12)
    if hours is None or course.flops is None:
        yield "time: not computed, because the operations of these layers are not counted"
        return
    yield (
        f"time: {course.flops:.3g} useful operations an iteration; {hours:,.1f} hours for "
        f"{course.all_rows:,} rows at an MFU of {speed.mfu:.0%} of {speed.peak_tflops:g} TFLOP/s "
        f"(assumed), with {MASKED:.0%} of the tokens masked, without evaluations and saves"
    )


def _disk(course: Course) -> Iterator[str]:
    size, kept = course.checkpoint_bytes, course.checkpoints
    if size is None:
        yield "checkpoints: none (no --save)"
    elif kept is None:
        yield f"checkpoints: {size / 1e9:,.0f} GB each"
    else:
        yield (
            f"checkpoints: {size / 1e9:,.0f} GB each, {kept} stay, {kept * size / 1e12:.3g} TB; "
            "one more during a save"
        )
