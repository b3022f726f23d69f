"""Decides the claims of RULES.md: reached or not; `not worse` may also be undecided or refuted."""

import math

from benchmarks.race.compare import adjusted
from benchmarks.race.plan import Shape
from benchmarks.race.results import Finals, Results, differences
from benchmarks.race.stages import confirm, incumbent, steps, transfer
from benchmarks.race.tables import Table, interval
from megatron_mdm.experiments.statistics import Interval, mean_interval

STEPS, WORSE, LEVEL = 0.45, 0.01, 0.05
ONE_SIDED = LEVEL / 2  # one-sided level of an interval's upper end


def summary(results: Results) -> list[Table]:
    """Makes the table of claims by shape; none before all their runs are finished."""
    winner = confirm.winner(results)
    needed = [run for stage in (confirm, transfer, steps) for run in stage.runs(results)]
    if winner is None or not all(run in results for run in needed):
        return []
    is_compared = incumbent.is_complete(results)
    rows, below = [], []
    for shape in (results.scale.main, *results.scale.transfer):
        finals = {**_finals(results, shape), **incumbent.finals(results, shape)}
        is_main = shape == results.scale.main
        family = confirm.challengers(results) if is_main else [winner]
        everyone = [name for name in results.scale.contenders if name != "standard"]
        below.append(is_below(finals, winner, "standard", everyone if is_main else [winner]))
        # The winner was chosen from the family on the same seeds, so the level is divided by its
        # size.
        level = 1 - 2 * ONE_SIDED / len(family)
        loss = _less(finals, winner, "bell", level)
        found = steps.complete(results, shape)
        share = mean_interval([steps.share_to(*x) for x in found.values()])
        rows += [
            [
                shape.name(),
                "below standard",
                interval(_less(finals, winner, "standard")),
                _word(below[-1]),
            ],
            [
                shape.name(),
                f"standard's final NELBO in {STEPS} of its steps",
                steps.share_text(share),
                _word(share.high <= STEPS),
            ],
            [
                shape.name(),
                "below clipped",
                interval(_less(finals, winner, "clipped")),
                _word(is_below(finals, winner, "clipped", family)),
            ],
            [
                shape.name(),
                f"not worse than bell by {WORSE}, at {level:.2%}",
                interval(loss),
                not_worse(loss),
            ],
        ]
        if is_compared:
            below.append(is_below(finals, winner, incumbent.CONTENDER, family))
            rows.append(
                [
                    shape.name(),
                    f"below recommended as it was ({incumbent.CONTENDER})",
                    interval(_less(finals, winner, incumbent.CONTENDER)),
                    _word(below[-1]),
                ]
            )
    if not all(below):
        verdict = f"is {incumbent.CONTENDER}"
    elif is_compared:
        verdict = f"is {winner}"
    else:
        verdict = f"is not decided before the stage {incumbent.NAME} is finished"
    header = [f"claim on {winner}", "", "value [95%, where no level is named]", ""]
    notes = [
        f"By the rules, `recommended` {verdict}.",
        "values: shares of the steps, and differences of final NELBO, below 0 where the winner is "
        "better",
    ]
    used = [*needed, *incumbent.runs(results)]
    return [Table("claims", header, rows, [*notes, *results.origins(used)])]


def is_below(finals: Finals, name: str, baseline: str, family: list[str]) -> bool:
    """Whether a contender ends below a baseline, by a test adjusted for a family of contenders."""
    p = adjusted(finals, baseline, family)
    return p[name] < LEVEL and _less(finals, name, baseline).value < 0.0


def _less(finals: Finals, name: str, baseline: str, level: float = 0.95) -> Interval:
    return mean_interval(differences(finals.get(name, {}), finals.get(baseline, {})), level)


def _finals(results: Results, shape: Shape) -> Finals:
    return (
        confirm.finals(results) if shape == results.scale.main else transfer.finals(results, shape)
    )


def _word(is_reached: bool) -> str:
    return "reached" if is_reached else "not reached"


def not_worse(loss: Interval) -> str:
    """Returns the verdict on the claim that a contender is not worse by WORSE."""
    if math.isnan(loss.low):
        return "undecided"
    if loss.high < WORSE:
        return "reached"
    return "refuted" if loss.low > WORSE else "undecided"
