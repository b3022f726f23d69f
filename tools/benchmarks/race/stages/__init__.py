"""The stages of the race by name: the most important ones first, the longest one last."""

from benchmarks.race.driver import Stage
from benchmarks.race.stages import (
    confirm,
    ending,
    explain,
    incumbent,
    larger,
    local,
    others,
    steps,
    transfer,
    tune,
)

STAGES: dict[str, Stage] = {
    "tune": tune,
    "confirm": confirm,
    "transfer": transfer,
    "steps": steps,
    "incumbent": incumbent,
    "ending": ending,
    "explain": explain,
    "local": local,
    "others": others,
    "larger": larger,
}
