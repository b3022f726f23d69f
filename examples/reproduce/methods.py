"""The compared methods, the scales, and the runs of each scale."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, NamedTuple

from problems import CELLS, Problem, story, table

from megatron_mdm.recipes import settings_of

Regime = Literal["fresh", "scarce"]


@dataclass(frozen=True)
class Task:
    """A kind of problem.

    Attributes:
        title: title in tables and figures.
        text: makes a problem for the text that the base model is pretrained on.
        pair: makes a problem for fine-tuning or testing.
        length: tokens of a row: those of the longest pair, and its end token.
    """

    title: str
    text: Callable[[Random], Problem]
    pair: Callable[[Random], Problem]
    length: int


TASKS = {
    "stories": Task("arithmetic stories", story, story, 29),
    "tables": Task("table lookup", table, table, 39),
}


@dataclass(frozen=True)
class Method:
    """A fine-tuning method.

    Attributes:
        name: name of the objective's method, as `settings_of` reads it.
        token_ids: field of MDMConfig -> words whose token ids are the field's value.
        rows: rows of a step, as a multiple of the usual number.
        causal: whether it trains the autoregressive network.
        stopped: whether training is stopped early, when the network solves as much as `standard`.
    """

    name: str = "standard"
    token_ids: Mapping[str, list[str]] = field(default_factory=dict)
    rows: int = 1
    causal: bool = False
    stopped: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of the objective: fields of MDMConfig, with words in place of token ids."""
        if self.causal:
            return {"shift": True}
        # ema_decay 1 turns the control variate off, unless the method sets it.
        return {"ema_decay": 1, **settings_of(self.name), **self.token_ids}

    @property
    def views(self) -> int:
        """Number of rows that are made from one text."""
        return int(self.settings.get("views", 1))

    @property
    def has_own_loss(self) -> bool:
        """Whether its loss and gradients have another scale than those of `standard`."""
        return self.name in ("clipped", "syrm")

    @property
    def is_steady(self) -> bool:
        """Whether batches are drawn in the same way throughout, so that noise can be measured."""
        return not self.causal and "bell_fade" not in self.settings


BOTH, BOTH_EPOCHS = "P-POTS + MIRROR", "P-POTS + MIRROR, equal epochs"
QUIET = "P-POTS gradient + lattice + exact-count"
DOUBLED, STOPPED = "standard, rows x 2", "autoregressive, stopped"
BELL = "bell that fades late + lattice + exact-count"
# The keys are the names in tables and results. With "equal epochs" every text is used as often as
# by `standard`, as in the paper; all other methods train on as many rows as `standard`.
METHODS = {
    "standard": Method(),
    "clipped": Method("clipped"),
    "P-POTS": Method("ppots-loss"),
    "MIRROR": Method("mirror"),
    BOTH: Method("paper"),
    "SyRM": Method("syrm", {"syrm_token_ids": CELLS}),
    QUIET: Method("ppots-gradient+lattice+exact-count"),
    "MIRROR, equal epochs": Method("mirror", rows=2),
    BOTH_EPOCHS: Method("paper", rows=2),
    DOUBLED: Method(rows=2),
    "autoregressive": Method(causal=True),
    STOPPED: Method(causal=True, stopped=True),
    BELL: Method("bell-late+lattice+exact-count"),
}


class Setting(NamedTuple):
    """Runs of one setting are comparable: they share the problems, the texts and the base model."""

    task: str
    regime: Regime
    base: int

    @property
    def title(self) -> str:
        """Title in tables."""
        more = f", base {self.base}" if self.base > 1 else ""
        return f"{TASKS[self.task].title}, {self.regime}{more}"


class Run(NamedTuple):
    """A fine-tuning run; the seed determines the order of texts, the masks and all other draws."""

    setting: Setting
    method: str
    seed: int


FRESH, SCARCE = Setting("stories", "fresh", 1), Setting("stories", "scarce", 1)
SECOND_BASE, TABLES = Setting("stories", "scarce", 2), Setting("tables", "scarce", 1)

# The paper's seeds first.
SEEDS = (42, 731, 20231, *range(1, 18))
EIGHT, TWENTY = 8, 20
# The step at which the autoregressive network is stopped is interpolated between runs of 1/16, 1/8,
# ... of the steps, with seeds that no other run has.
PARTS = (16, 8, 4, 2, 1)
CALIBRATION_SEEDS = (101, 102, 103, 104)


class Cost(NamedTuple):
    """Measured core-seconds of a scale's runs, from which `--plan` estimates the cost.

    Attributes:
        start: start of a process.
        token: training on a token.
        problem: decoding a problem.
        measurement: measuring the noise of training in one run.
    """

    start: float
    token: float
    problem: float
    measurement: float


@dataclass(frozen=True)
class Scale:
    """The sizes of models, data and runs.

    Attributes:
        layers, hidden, heads: sizes of the network.
        texts: number of problems for pretraining.
        pretraining: optimizer steps of a base model.
        causal_pretraining: optimizer steps of the autoregressive network's base model.
        pairs: number of problems for fine-tuning, in each regime.
        steps: optimizer steps of a fine-tuning, for each task.
        batch: rows in a step.
        held_out, tests: number of problems for the NELBO, and for testing.
        gradients: batches of each method whose gradients are measured.
        nested: rows on which A, B and C are measured.
        measured: number of seeds whose `standard` run is measured during training.
        calibration: number of seeds of the calibration runs, which determine the step at which the
            autoregressive network is stopped.
        entries: setting -> method -> number of seeds.
        cost: measured cost of the runs; None if it has not been measured.
        accepts: smallest and largest share of right answers of the first run of `standard`; if it
            is outside, the other runs of its setting are not done. None: all runs are done.
        is_smoke_test: whether the scale only shows that everything runs.
    """

    layers: int
    hidden: int
    heads: int
    texts: int
    pretraining: int
    causal_pretraining: int
    pairs: Mapping[Regime, int]
    steps: Mapping[str, int]
    batch: int
    held_out: int
    tests: int
    gradients: int
    nested: int
    measured: int
    calibration: int
    entries: Mapping[Setting, Mapping[str, int]]
    cost: Cost | None = None
    accepts: tuple[float, float] | None = None
    is_smoke_test: bool = False


STORIES = (
    *("standard", "P-POTS", "MIRROR", BOTH, QUIET, "clipped"),
    *("MIRROR, equal epochs", BOTH_EPOCHS, DOUBLED, "autoregressive"),
    BELL,
)

SCALES = {
    "ci": Scale(
        layers=1,
        hidden=32,
        heads=2,
        texts=3000,
        pretraining=20,
        causal_pretraining=20,
        pairs={"fresh": 400, "scarce": 100},
        steps={"stories": 20, "tables": 20},
        batch=16,
        held_out=100,
        tests=20,
        gradients=2,
        nested=3,
        measured=1,
        calibration=1,
        entries={SCARCE: {"standard": 1, BOTH_EPOCHS: 1, STOPPED: 1}, TABLES: {"SyRM": 1}},
        is_smoke_test=True,
    ),
    "laptop": Scale(
        layers=2,
        hidden=64,
        heads=4,
        texts=40_000,
        pretraining=8000,
        causal_pretraining=400,
        pairs={"fresh": 60_000, "scarce": 1600},
        steps={"stories": 800, "tables": 800},
        batch=32,
        held_out=2000,
        tests=4000,
        gradients=60,
        nested=100,
        measured=3,
        calibration=4,
        entries={
            FRESH: dict.fromkeys(STORIES, EIGHT),
            SCARCE: dict.fromkeys(STORIES, EIGHT)
            | dict.fromkeys(("standard", BOTH, BOTH_EPOCHS, DOUBLED, STOPPED), TWENTY),
            SECOND_BASE: dict.fromkeys(("standard", BOTH, BOTH_EPOCHS), EIGHT),
            TABLES: dict.fromkeys(
                ("standard", BOTH, BOTH_EPOCHS, "SyRM", QUIET, "autoregressive"), EIGHT
            ),
        },
        cost=Cost(start=3.0, token=27e-6, problem=3.5e-3, measurement=160.0),
        accepts=(0.4, 0.8),
    ),
    # One question, for an H100 in 150 seconds: does a network of 25 times the size gain more from
    # MIRROR's second view than from a second epoch of `standard`?
    "gpu": Scale(
        layers=4,
        hidden=256,
        heads=8,
        texts=100_000,
        pretraining=1000,
        causal_pretraining=0,
        pairs={"scarce": 1600},
        steps={"stories": 300},
        batch=64,
        held_out=2000,
        tests=4000,
        gradients=0,
        nested=0,
        measured=0,
        calibration=0,
        entries={SCARCE: {BOTH_EPOCHS: 4, DOUBLED: 4}},
    ),
}


def runs(scale: Scale) -> list[Run]:
    """Returns all fine-tuning runs, without the calibration runs, seed by seed."""
    return [
        Run(setting, method, seed)
        for place, seed in enumerate(SEEDS)
        for setting, methods in scale.entries.items()
        for method, count in methods.items()
        if place < count
    ]


def stopped_in(scale: Scale) -> list[Setting]:
    """Returns the settings with a stopped autoregressive network."""
    return [s for s, methods in scale.entries.items() if any(METHODS[m].stopped for m in methods)]


def calibration_runs(scale: Scale, setting: Setting) -> list[tuple[Run, int]]:
    """Returns the calibration runs and their steps.

    The runs of `standard` come first: with its own number of steps, then with 25% more.
    """
    seeds = CALIBRATION_SEEDS[: scale.calibration]
    whole = scale.steps[setting.task]
    more = max(whole + 1, whole * 5 // 4)
    lengths = sorted({max(1, whole // part) for part in PARTS})
    return [
        *((Run(setting, "standard", seed), n) for n in (whole, more) for seed in seeds),
        *((Run(setting, "autoregressive", seed), n) for n in lengths for seed in seeds),
    ]


def gate(setting: Setting) -> Run:
    """Returns the run that decides whether a setting's other runs are done; see `Scale.accepts`."""
    return Run(setting, "standard", SEEDS[0])


def is_measured(scale: Scale, run: Run) -> bool:
    """Whether the noise of training is measured at the start, the middle and the end of a run."""
    first = run.seed in SEEDS[: scale.measured] and run.setting.base == 1
    return first and run.method == "standard"


def core_hours(scale: Scale) -> float | None:
    """Estimates the core-hours of a scale; None if its cost has not been measured."""
    cost = scale.cost
    if cost is None:
        return None
    todo = [
        *((run, scale.steps[run.setting.task]) for run in runs(scale)),
        *(pair for setting in stopped_in(scale) for pair in calibration_runs(scale, setting)),
    ]
    seconds = 0.0
    for task, _, causal in {
        (run.setting.task, run.setting.base, METHODS[run.method].causal) for run, _ in todo
    }:
        steps = scale.causal_pretraining if causal else scale.pretraining
        seconds += cost.start + 2 * scale.batch * steps * TASKS[task].length * cost.token
    for run, steps in todo:
        method = METHODS[run.method]
        rows = 0 if method.stopped else scale.batch * method.rows * steps
        seconds += 2 * cost.start + rows * TASKS[run.setting.task].length * cost.token
        seconds += scale.tests * cost.problem + is_measured(scale, run) * cost.measurement
    return seconds / 3600
