"""Runs, and the sizes of a race.

A stage is a module with two functions. `runs(results)` returns all its runs that are known so far,
in the order in which they start: learning rates depend on the results of `tune`, and the winner on
those of `confirm`. `summary(results)` makes tables of the finished runs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

EVALUATIONS = 6


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run: everything that determines its result, except the program and the data.

    Attributes:
        stage: name of the stage that needs it.
        contender: key of CONTENDERS.
        length: tokens of a row.
        rows: rows of a batch.
        model: key of `Scale.models`.
        steps: steps of the whole schedule.
        lr: largest learning rate.
        seed: seed, at least 1.
        flags: further flags, which override those from the other attributes.
        data: source of the rows: `python`, or `unigram` for the tokens of unigram.py.
        judged: whether judge.py judges the trained model before it is deleted.
    """

    stage: str
    contender: str
    length: int
    rows: int
    model: str
    steps: int
    lr: float
    seed: int
    flags: tuple[str, ...] = ()
    data: Literal["python", "unigram"] = "python"
    judged: bool = False

    @property
    def evaluated(self) -> list[int]:
        """Steps after which the NELBO is measured: every `interval` steps, and at the end."""
        return [*range(self.interval, self.steps + 1, self.interval), self.steps]

    @property
    def interval(self) -> int:
        """Steps between evaluations, so that the sixth evaluation is at the end."""
        return self.steps // EVALUATIONS + 1

    def text(self) -> str:
        """Returns a description for a progress line."""
        more = f", {' '.join(self.flags)}" if self.flags else ""
        return (
            f"{self.stage}: {self.contender}, {self.length} x {self.rows}, {self.model}, "
            f"{self.steps} steps, learning rate {self.lr:g}, seed {self.seed}{more}"
        )


@dataclasses.dataclass(frozen=True)
class Shape:
    """Row length, batch, model and steps, which runs of all contenders have in common.

    Attributes:
        length: see `Run`.
        rows: see `Run`.
        model: see `Run`.
        steps: see `Run`.
        seconds: seconds of a run on one thread, for estimates.
    """

    length: int
    rows: int
    model: str
    steps: int
    seconds: float

    def run(self, stage: str, contender: str, lr: float, seed: int, **more: Any) -> Run:
        """Makes a run of this shape; `more` replaces attributes of it."""
        run = Run(stage, contender, self.length, self.rows, self.model, self.steps, lr, seed)
        return dataclasses.replace(run, **more)

    def name(self) -> str:
        """Returns a name for tables, such as "128 x 16, 0.2M, 1500 steps"."""
        return f"{self.length} x {self.rows}, {self.model}, {self.steps} steps"


@dataclasses.dataclass(frozen=True)
class Model:
    """A Transformer; its feed-forward width is four times its width."""

    layers: int
    width: int
    heads: int

    @property
    def init_std(self) -> float:
        """Initial standard deviation. With Megatron's 0.02 training stays on a plateau for long."""
        return float(self.width**-0.5)


@dataclasses.dataclass(frozen=True)
class Judging:
    """The settings for judging trained models.

    Attributes:
        judge: shape of the judge's runs, except that its rows are as long as the judged ones.
        lr: the judge's largest learning rate.
        draws: number of masks of each held-out row.
        texts: number of rows that a model writes.
        calls: number of calls of the model for a row.
        seconds: seconds of judging one model, for estimates.
    """

    judge: Shape
    lr: float
    draws: int
    texts: int
    calls: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of a race.

    Attributes:
        models: models by name.
        main: shape at which learning rates are tuned and claims are tested.
        transfer: shapes with other row lengths.
        larger: shapes with longer rows, a larger model, or more steps.
        rates: grid of learning rates, each twice the one before.
        extensions: number of rates that may be added to the grid at each end.
        tune_seed: seed of the runs that choose learning rates; no other run has it.
        confirm_seeds, transfer_seeds, larger_seeds: seeds of the stages of these names.
        fractions: fractions of the steps, for shorter schedules.
        contenders: keys of MAIN.
        others: keys of OTHERS.
        held_out: number of rows that all runs of a length are measured on.
        judging: settings for judging the models of the stage `ending`, which has the main shape.
        ending_seeds, explain_seeds, local_seeds: seeds of the stages of these names.
        explain: two shapes that only differ in the batch size, the smaller one first.
        local: shape of the runs on independent tokens.
    """

    models: Mapping[str, Model]
    main: Shape
    transfer: tuple[Shape, ...]
    larger: tuple[Shape, ...]
    rates: tuple[float, ...]
    extensions: int
    tune_seed: int
    confirm_seeds: tuple[int, ...]
    transfer_seeds: tuple[int, ...]
    larger_seeds: tuple[int, ...]
    fractions: tuple[float, ...]
    contenders: tuple[str, ...]
    others: tuple[str, ...]
    held_out: int
    judging: Judging
    ending_seeds: tuple[int, ...]
    explain: tuple[Shape, Shape]
    explain_seeds: tuple[int, ...]
    local: Shape
    local_seeds: tuple[int, ...]
