"""The claims of RULES.md: each reached or not."""

from benchmarks.race.plan import Shape
from benchmarks.race.results import Finals, Results, differences
from benchmarks.race.stages import confirm, steps, transfer
from benchmarks.race.tables import Table, interval
from megatron_mdm.experiments.statistics import Interval, holm, mean_interval, t_test

STEPS, WORSE, LEVEL = 0.45, 0.01, 0.05


def summary(results: Results) -> list[Table]:
    """A table of claims, by shape; none before their last run is finished."""
    winner = confirm.winner(results)
    needed = [run for stage in (confirm, transfer, steps) for run in stage.runs(results)]
    if winner is None or not all(run in results for run in needed):
        return []
    rows, below = [], []
    for shape in (results.scale.main, *results.scale.transfer):
        finals = _finals(results, shape)
        is_main = shape == results.scale.main
        family = confirm.challengers(results) if is_main else [winner]
        everyone = [name for name in finals if name != "standard"] if is_main else [winner]
        less = {name: _less(finals, winner, name) for name in ("standard", "clipped", "bell")}
        below.append(is_below(finals, winner, "standard", everyone))
        found = steps.complete(results, shape)
        share = mean_interval([steps.share_to(*x) for x in found.values()])
        rows += [
            [shape.name(), "below standard", interval(less["standard"]), _word(below[-1])],
            [
                shape.name(),
                f"standard's final NELBO in {STEPS} of its steps",
                steps.share_text(share),
                _word(share.high <= STEPS),
            ],
            [
                shape.name(),
                "below clipped",
                interval(less["clipped"]),
                _word(is_below(finals, winner, "clipped", family)),
            ],
            [
                shape.name(),
                f"not worse than bell by {WORSE}",
                interval(less["bell"]),
                _word(less["bell"].high < WORSE),
            ],
        ]
    becomes = f"becomes {winner}" if all(below) else "stays as it is"
    header = [f"claim on {winner}", "", "value [95%]", ""]
    return [Table("claims", header, rows, [f"`recommended` {becomes}."])]


def is_below(finals: Finals, name: str, baseline: str, family: list[str]) -> bool:
    """Whether a contender ends below a baseline, by a test of a family of contenders."""
    p = {x: t_test(differences(finals.get(x, {}), finals.get(baseline, {}))) for x in family}
    return holm(p)[name] < LEVEL and _less(finals, name, baseline).value < 0.0


def _less(finals: Finals, name: str, baseline: str) -> Interval:
    return mean_interval(differences(finals.get(name, {}), finals.get(baseline, {})))


def _finals(results: Results, shape: Shape) -> Finals:
    return (
        confirm.finals(results) if shape == results.scale.main else transfer.finals(results, shape)
    )


def _word(is_reached: bool) -> str:
    return "reached" if is_reached else "not reached"
