"""What is compared, at which size, and the runs that this takes."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_mdm.recipes import settings_of

PAPER_SEEDS = (42, 731, 20231)
# Words that ISAD masks more often: what separates steps and answers.
DELIMITERS = ["=", ";", "#"]
# Words that SyRM masks in prompts: what all prompts share. All others but names and things decide
# the answer.
STRUCTURE = ["has", ".", "how", "many", "?"]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: of the objective's methods, as `settings_of` reads it.
        token_ids: words of what it masks more often, or as well: fields of MDMConfig.
        rows: of a step, in multiples of the others'.
        steps: of the run, in multiples of the others'.
        causal: the autoregressive network.
    """

    name: str = "standard"
    token_ids: dict[str, list[str]] = field(default_factory=dict)
    rows: int = 1
    steps: float = 1.0
    causal: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of the objective: fields of MDMConfig."""
        if self.causal:
            return {"shift": True}
        # Only the method of that name has a control variate.
        return {"ema_decay": 1, **settings_of(self.name), **self.token_ids}

    @property
    def views(self) -> int:
        """Rows made of one text."""
        return int(self.settings.get("views", 1))


# The keys are the names in the tables, and in the results that are kept (results/laptop.json): they
# stay as they are. The names of megatron_mdm/recipes.py are in parentheses.
METHODS = {
    "standard": Method(),
    "clipped": Method("clipped"),
    "P-POTS": Method("ppots-loss"),
    "MIRROR": Method("mirror"),
    "P-POTS + MIRROR": Method("paper"),
    "ISAD": Method("isad", {"isad_token_ids": DELIMITERS}),
    "SyRM": Method("syrm", {"syrm_token_ids": STRUCTURE}),
    "StraTS": Method("strata"),
    "EMA": Method("ema"),
    "recommended": Method("recommended"),
    "autoregressive": Method(causal=True),
}
# What the others are measured against: more of `standard`, and less of the autoregressive network.
CONTROLS = {
    "standard, rows x 2": Method(rows=2),
    "standard, steps x 4": Method(steps=4.0),
    "autoregressive, steps / 4": Method(steps=0.25, causal=True),
}
DOUBLED, LONGER, SHORTER = CONTROLS
ALL = METHODS | CONTROLS


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        texts, pairs, tests: problems to pretrain on, to fine-tune on, to solve.
        layers, hidden, heads: of the network.
        pretraining, steps: optimizer steps of the pretraining and of each fine-tuning.
        batch: rows in a step.
        gradients: batches of each method whose gradients are measured.
        methods, seeds: of the study.
    """

    texts: int
    pairs: int
    tests: int
    layers: int
    hidden: int
    heads: int
    pretraining: int
    steps: int
    batch: int
    gradients: int
    methods: tuple[str, ...] = tuple(ALL)
    seeds: tuple[int, ...] = PAPER_SEEDS


# Short enough that `standard` solves some of the problems and not all: where it solves all, nothing
# can be better, and whatever gains does so by learning the same earlier.
SCALES = {
    "ci": Scale(
        *(3000, 400, 20, 1, 32, 2, 20, 20, 16, 2),
        methods=("standard", "MIRROR", "autoregressive"),
        seeds=PAPER_SEEDS[:1],
    ),
    # About 1800 seconds of one core for each seed, a fifth of it for its two bases.
    "laptop": Scale(
        *(40_000, 20_000, 1000, 2, 64, 4, 2500, 1000, 32, 100), seeds=(*PAPER_SEEDS, 1, 2, 3, 4, 5)
    ),
    "gpu": Scale(400_000, 100_000, 1000, 4, 256, 8, 2000, 600, 128, 100),
}


class Task(NamedTuple):
    """A run: `epochs` takes every text as often as `standard`, instead of as many rows."""

    method: str
    seed: int
    epochs: bool = False

    @property
    def entry(self) -> str:
        """What it is called in tables, whatever the seed."""
        return f"{self.method}, equal epochs" if self.epochs else self.method

    def batch(self, scale: Scale) -> int:
        """Rows of a step."""
        method = ALL[self.method]
        return scale.batch * method.rows * (method.views if self.epochs else 1)

    def steps(self, scale: Scale) -> int:
        """Optimizer steps."""
        return math.ceil(scale.steps * ALL[self.method].steps)


def tasks(scale: Scale) -> list[Task]:
    """All runs: seed by seed, and the longest first, so that no job waits for another at the end.

    Only methods with several views have a run of their own at equal epochs.
    """
    found = []
    for seed in scale.seeds:
        runs = [Task(m, seed, epochs) for m in scale.methods for epochs in own_epochs(m)]
        found += sorted(runs, key=lambda task: -task.batch(scale) * task.steps(scale))
    return found


def own_epochs(method: str) -> tuple[bool, ...]:
    """The values of `Task.epochs` that a method is run under."""
    return (False, True) if ALL[method].views > 1 else (False,)
