"""The plan of a soak: the flags of its runs, their layouts, and the moments of the strikes."""

import pathlib
import random
from dataclasses import dataclass

from benchmarks.python_text import MASK, VOCABULARY

# Number of ranks, and flags that divide the model.
LAYOUTS = {
    "DP2": (2, ""),
    "TP2": (2, "--tensor-model-parallel-size 2"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "one": (1, ""),
}
# Whom a strike hits: SIGKILL for one rank, the launcher or every process; SIGTERM to the launcher.
KINDS = ("rank", "all", "launcher", "stop")
BACKGROUND = "--async-save --num-workers 2"
COMPARED = 20  # steps after a change of layout that the old layout repeats


@dataclass(frozen=True)
class Strike:
    """A signal at a random moment.

    Attributes:
        kind: one of `KINDS`.
        iteration: the run is struck once its log shows this iteration.
        delay: seconds from then on, in which a save may begin.
        victim: chooses the rank.
    """

    kind: str
    iteration: int
    delay: float
    victim: int


@dataclass(frozen=True)
class Leg:
    """A part of the struck run that has one layout and ends after iteration `end`."""

    layout: str
    end: int


@dataclass(frozen=True)
class Plan:
    """Everything that a soak does.

    Attributes:
        iterations: length of the uninterrupted run, and of the struck run.
        legs: the legs of the struck run; the uninterrupted run has the layout of the first.
        strikes: in the order of their iterations.
        interval: iterations between evaluations, saves and lines of the log.
    """

    iterations: int
    legs: tuple[Leg, ...]
    strikes: tuple[Strike, ...]
    interval: dict[str, int]


def make_plan(steps: int, layouts: list[str], strikes: int, seed: int) -> Plan:
    """Draws a plan.

    Args:
        steps: steps of both runs together.
        layouts: layouts of the struck run; the first one has half of its iterations.
        strikes: number of strikes, one in each of as many equal parts of the struck run.
        seed: seed of the moments.
    """
    iterations = steps // 2
    first = iterations // 2 if len(layouts) > 1 else iterations
    ends = [
        first + (iterations - first) * number // max(1, len(layouts) - 1)
        for number in range(len(layouts))
    ]
    chance = random.Random(seed)
    part = iterations / max(1, strikes)
    drawn = tuple(
        Strike(
            KINDS[number % len(KINDS)],
            int(part * (number + chance.uniform(0.1, 0.8))),
            chance.uniform(0.0, 0.2),
            chance.randrange(8),
        )
        for number in range(strikes)
    )
    save = max(25, iterations // 50)
    interval = {"save": save, "evaluation": save, "log": max(1, min(20, save // 5))}
    legs = tuple(Leg(layout, end) for layout, end in zip(layouts, ends, strict=True))
    return Plan(iterations, legs, drawn, interval)


def flags_of(plan: Plan, directory: pathlib.Path, seed: int) -> list[str]:
    """Flags that all runs of a soak share: a model of 2 layers of width 16, rows of 16 tokens.

    Args:
        plan: the plan.
        directory: directory of data and index cache.
        seed: seed of weights, rows and masks.
    """
    interval = plan.interval
    return [
        *f"--mdm-device cpu --seed {seed} --mdm-recipe recommended".split(),
        # The bell fades, and then P-POTS takes over, both while the run has its first layout.
        *"--mdm-bell-fade 0.1 0.25 --mdm-ppots-target gradient".split(),
        *f"--mdm-ppots-refit-interval {interval['save']}".split(),
        *"--num-layers 2 --hidden-size 16 --num-attention-heads 2 --ffn-hidden-size 32".split(),
        *"--seq-length 16 --max-position-embeddings 16 --position-embedding-type rope".split(),
        *"--normalization RMSNorm --swiglu --disable-bias-linear".split(),
        *"--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0".split(),
        *"--micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --lr-decay-style constant".split(),
        # Padded to the same size whatever the tensor-parallel size.
        *f"--tokenizer-type NullTokenizer --vocab-size {VOCABULARY}".split(),
        *f"--null-tokenizer-eod-id 0 --mdm-mask-token-id {MASK}".split(),
        *"--make-vocab-size-divisible-by 160 --num-workers 0 --split 90,10,0".split(),
        *f"--data-path {directory / 'text'} --data-cache-path {directory / 'cache'}".split(),
        *f"--train-iters {plan.iterations} --log-interval {interval['log']}".split(),
        *f"--eval-interval {interval['evaluation']} --eval-iters 2".split(),
        *"--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable".split(),
    ]


def saving(plan: Plan, directory: pathlib.Path) -> list[str]:
    """Flags of a run that saves into a directory, and resumes from it.

    Args:
        plan: the plan.
        directory: directory of the run.
    """
    return [
        *f"--save {directory / 'checkpoint'} --load {directory / 'checkpoint'}".split(),
        *f"--save-interval {plan.interval['save']}".split(),
        *f"--save-retain-interval {retained(plan)}".split(),
        *f"--tensorboard-dir {directory / 'tb'}".split(),
    ]


def retained(plan: Plan) -> int:
    """Iterations between checkpoints that are kept."""
    return plan.interval["save"] * max(1, plan.iterations // plan.interval["save"] // 4)
