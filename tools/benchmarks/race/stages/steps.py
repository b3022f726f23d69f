"""The stage `steps`: the share of its steps after which the winner equals `standard`'s end."""

import math
from collections.abc import Mapping

from benchmarks.race.plan import Run, Shape
from benchmarks.race.results import Results
from benchmarks.race.stages import confirm, transfer, tune
from benchmarks.race.tables import Table, interval, number
from megatron_mdm.experiments.statistics import Interval, mean_interval

NAME = "steps"


def runs(results: Results) -> list[Run]:
    """Returns runs of the winner with shorter schedules, shape by shape and seed by seed."""
    scale = results.scale
    return [run for shape in (scale.main, *scale.transfer) for run in _of_shape(results, shape)]


def _of_shape(results: Results, shape: Shape) -> list[Run]:
    scale = results.scale
    winner = confirm.winner(results)
    lr = None if winner is None else tune.rate(results, winner)
    if winner is None or lr is None:
        return []
    return [
        shape.run(NAME, winner, lr, seed, steps=round(fraction * shape.steps))
        for seed in (scale.confirm_seeds if shape == scale.main else scale.transfer_seeds)
        for fraction in scale.fractions
    ]


def _whole(results: Results, shape: Shape) -> list[Run]:
    """Returns the runs of `standard` and of the winner with all of the steps."""
    if shape == results.scale.main:
        return confirm.runs(results)
    return transfer.of_shape(results, shape)


def fractions(results: Results, shape: Shape) -> dict[int, tuple[float, dict[float, float]]]:
    """Returns, by seed, `standard`'s final NELBO, and the winner's by its share of the steps."""
    winner = confirm.winner(results)
    whole = _whole(results, shape)
    targets = results.finals(whole).get("standard", {})
    found: dict[int, tuple[float, dict[float, float]]] = {}
    for seed, target in targets.items():
        own = [run for run in [*_of_shape(results, shape), *whole] if run.contender == winner]
        reached = {
            run.steps / shape.steps: results[run].final
            for run in own
            if run.seed == seed and run in results
        }
        found[seed] = target, dict(sorted(reached.items()))
    return found


def complete(results: Results, shape: Shape) -> dict[int, tuple[float, dict[float, float]]]:
    """Returns `fractions` for the seeds without missing runs."""
    needed = len(results.scale.fractions) + 1
    found = fractions(results, shape).items()
    return {seed: (target, reached) for seed, (target, reached) in found if len(reached) == needed}


def share_to(target: float, reached: Mapping[float, float]) -> float:
    """Returns the share of the steps at which a NELBO is reached, by linear interpolation.

    Args:
        target: NELBO to reach.
        reached: share of the steps, ascending -> final NELBO.

    Returns:
        The share. If already the smallest share reaches the target, that share; infinity if none
        reaches it.
    """
    before: tuple[float, float] | None = None
    for share, value in reached.items():
        if value <= target:
            if before is None or not math.isfinite(before[1]):
                return share
            part = (before[1] - target) / (before[1] - value)
            return before[0] + part * (share - before[0])
        before = share, value
    return math.inf


def share_text(share: Interval) -> str:
    """Formats a share of the steps; "not reached" if one of the seeds misses its target."""
    return interval(share, ".3f") if math.isfinite(share.value) else "not reached"


def summary(results: Results) -> list[Table]:
    """Makes a table by shape: NELBO by seed and share, and the share that equals `standard`."""
    tables = []
    for shape in (results.scale.main, *results.scale.transfer):
        found = complete(results, shape)
        if not found:
            continue
        shares = [share_to(*x) for x in found.values()]
        columns = list(next(iter(found.values()))[1])
        rows = [
            [
                f"seed {seed}",
                *map(number, [target, *reached.values()]),
                share_text(mean_interval([share])),
            ]
            for (seed, (target, reached)), share in zip(found.items(), shares, strict=True)
        ]
        mean = share_text(mean_interval(shares))
        rows.append(["mean [95%]", *[""] * (len(columns) + 1), mean])
        header = [
            "final NELBO",
            "standard",
            *(f"{share:.2f}" for share in columns),
            "equals standard at",
        ]
        title = f"{NAME}: {confirm.winner(results)}, shares of the steps, {shape.name()}"
        notes = [
            "equals standard at: the share of the steps at which the winner has the final NELBO "
            "that standard has after all of them, linear between the shares that were run"
        ]
        if columns[0] in shares:
            notes.append(
                f"a share of {columns[0]:.2f} is an upper bound, since no shorter one was run: the "
                "mean is one too, and the interval is narrower than that of the shares themselves"
            )
        notes += results.origins([*_of_shape(results, shape), *_whole(results, shape)])
        tables.append(Table(title, header, rows, notes))
    return tables
