"""What a run is, and the sizes of a race.

A stage is a module with two functions. `runs(results)` lists all its runs that are known so far, in
the order in which they are begun: learning rates follow from the results of `tune`, the winner from
those of `confirm`. `summary(results)` makes tables of those that are finished.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

EVALUATIONS = 6


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run; all that its result follows from, beside the program and the data.

    Attributes:
        stage: for which it is made.
        contender: key of CONTENDERS.
        length: tokens of a row.
        rows: of a batch.
        model: key of `Scale.models`.
        steps: of the whole schedule.
        lr: largest learning rate.
        seed: at least 1.
        flags: more flags; they win over those that follow from the rest.
        data: what rows are of: `python`, or the tokens of unigram.py.
        judged: judge the trained model, as judge.py does, before it is deleted.
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
        """Steps after which the NELBO is measured: every `interval`, and at the end."""
        return [*range(self.interval, self.steps + 1, self.interval), self.steps]

    @property
    def interval(self) -> int:
        """Steps between evaluations, so that the last one, at the end, is the sixth."""
        return self.steps // EVALUATIONS + 1

    def text(self) -> str:
        """For a line of progress."""
        more = f", {' '.join(self.flags)}" if self.flags else ""
        return (
            f"{self.stage}: {self.contender}, {self.length} x {self.rows}, {self.model}, "
            f"{self.steps} steps, learning rate {self.lr:g}, seed {self.seed}{more}"
        )


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows, model and steps, which runs of all contenders have in common.

    Attributes:
        length: see `Run`.
        rows: see `Run`.
        model: see `Run`.
        steps: see `Run`.
        seconds: of a run on one thread, for estimates.
    """

    length: int
    rows: int
    model: str
    steps: int
    seconds: float

    def run(self, stage: str, contender: str, lr: float, seed: int, **more: Any) -> Run:
        """A run of this shape, other than it where `more` says so."""
        run = Run(stage, contender, self.length, self.rows, self.model, self.steps, lr, seed)
        return dataclasses.replace(run, **more)

    def name(self) -> str:
        """For a table: 128 x 16."""
        return f"{self.length} x {self.rows}, {self.model}, {self.steps} steps"


@dataclasses.dataclass(frozen=True)
class Model:
    """A Transformer; its feed-forward part is four times as wide."""

    layers: int
    width: int
    heads: int

    @property
    def init_std(self) -> float:
        """A size at which it learns from the start; Megatron's 0.02 keeps it on a plateau."""
        return float(self.width**-0.5)


@dataclasses.dataclass(frozen=True)
class Judging:
    """How trained models are judged.

    Attributes:
        judge: shape of the runs of the judge, whose rows are as long as those that it judges.
        lr: its largest learning rate.
        draws: masks of each held-out row.
        texts: rows that a model writes.
        calls: of the model for a row.
        seconds: of judging one model, for estimates.
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
        models: by name.
        main: shape at which rates are tuned and claims are tested.
        transfer: shapes of other lengths.
        larger: longer rows, a larger model, more steps.
        rates: grid of learning rates, each twice the one before.
        extensions: rates that may be added to the grid at each end.
        tune_seed: of the runs that choose the rates, and of no others.
        confirm_seeds, transfer_seeds, larger_seeds: of the other stages.
        fractions: of the steps, for whole schedules that are shorter.
        contenders: keys of MAIN.
        others: keys of OTHERS.
        held_out: rows that all runs of a length are measured on.
        judging: of the models of `ending`, which has the main shape.
        ending_seeds, explain_seeds, local_seeds: of the stages of these names.
        explain: shapes that differ in the size of a batch: a small one and a large one.
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
