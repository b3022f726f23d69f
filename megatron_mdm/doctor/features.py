"""The table of features: what each one needs, and which flag of a launch uses it."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_mdm.config import MDMConfig
from megatron_mdm.doctor.facts import CUDA, HELPERS, MEGATRON, PACKAGES, TORCH, Facts
from megatron_mdm.libraries import (
    ACCUMULATES_GRADIENTS,
    FP4_RECIPES,
    FP8_RECIPES,
    LM_EVAL,
    MATPLOTLIB,
    RELEASED_CODE_RUNS_WITH,
    RESILIENCY,
    TENSORBOARD,
    TRANSFORMER_ENGINE,
    TRANSFORMERS,
    Library,
    fp8_obstacle,
)
from megatron_mdm.versions import missing_part

# A condition: returns why it is not met and how to mend it, in one line, or None.
Need = Callable[[Facts], str | None]


@dataclass(frozen=True)
class Feature:
    """A feature of the package."""

    name: str
    needs: Sequence[Need]
    """Its conditions."""

    flag: Callable[[Namespace], str | None] = lambda _: None
    """The flag with which parsed arguments of a launch ask for it; None if they do not."""

    def obstacle(self, facts: Facts) -> str | None:
        """The conditions that are not met and remedies, or None if the feature can run."""
        return "; ".join(line for need in self.needs if (line := need(facts))) or None


def _no_problem(name: str) -> Need:
    return lambda facts: facts.problems.get(name)


def _gpu(facts: Facts) -> str | None:
    return "no GPU" if CUDA in facts.problems else None  # the section of GPUs has the cause


def _library(library: Library) -> Need:
    def need(facts: Facts) -> str | None:
        if library.module in facts.libraries:
            return facts.problems.get(library.name)
        return f"{library.name} is not installed: {library.install}"

    return need


def _recipe(recipe: str) -> Need:
    def need(facts: Facts) -> str | None:
        if not facts.gpus:
            return None  # another condition
        capability = min(gpu.capability for gpu in facts.gpus)
        line = fp8_obstacle(recipe, capability, facts.cuda)
        if line is None:
            return None
        delayed = fp8_obstacle("delayed", capability, facts.cuda)
        other = "--bf16 alone" if delayed else "--fp8-format hybrid --fp8-recipe delayed"
        return f"{line}: use {other}"

    return need


def _parts(flags: Sequence[str]) -> Need:
    def need(facts: Facts) -> str | None:
        version = facts.versions["transformer-engine"]
        return None if version is None else missing_part(version, flags)

    return need


def _released_code(facts: Facts) -> str | None:
    version = facts.versions.get("transformers")
    if version in (None, RELEASED_CODE_RUNS_WITH):
        return None
    return (
        f"transformers is {version}, and the code was written for {RELEASED_CODE_RUNS_WITH}: in an "
        f"environment of its own, pip install 'transformers=={RELEASED_CODE_RUNS_WITH}'"
    )


def _when(flag: str, condition: Callable[[Namespace], object]) -> Callable[[Namespace], str | None]:
    return lambda args: flag if condition(args) else None


def _uses_engine(args: Namespace) -> bool:
    return bool(args.mdm_device == "cuda" and args.transformer_impl != "local")


MEGATRON_RUNS = tuple(map(_no_problem, (TORCH, MEGATRON, PACKAGES, HELPERS)))
ON_GPU = (*MEGATRON_RUNS, _gpu)
IN_ENGINE = (*ON_GPU, _library(TRANSFORMER_ENGINE))


def _low_precision(kind: str, recipe: str) -> Feature:
    flags = [f"--{kind}-format", f"--{kind}-recipe {recipe}"]
    return Feature(
        f"{kind.upper()}, {flags[1]}",
        [*IN_ENGINE, _parts(flags), _recipe(recipe)],
        _when(
            " with ".join(flags),
            lambda args: getattr(args, kind) and getattr(args, f"{kind}_recipe") == recipe,
        ),
    )


FEATURES = (
    Feature(
        "CPU mode",
        MEGATRON_RUNS,
        _when("--mdm-device cpu", lambda args: args.mdm_device == "cpu"),
    ),
    Feature(
        "local layers on a GPU",
        ON_GPU,
        _when(
            "--transformer-impl local",
            lambda args: args.mdm_device == "cuda" and args.transformer_impl == "local",
        ),
    ),
    Feature(
        "Transformer Engine's layers",
        IN_ENGINE,
        _when("--transformer-impl transformer_engine, the default,", _uses_engine),
    ),
    Feature(
        "documents apart in Transformer Engine's attention",
        IN_ENGINE,
        _when(
            "--mdm-isolate-documents or --mdm-random-length-fraction",
            lambda args: _uses_engine(args) and MDMConfig.from_args(args).divides_rows,
        ),
    ),
    Feature(
        "context parallelism",
        IN_ENGINE,
        _when("--context-parallel-size", lambda args: args.context_parallel_size > 1),
    ),
    *(_low_precision("fp8", recipe) for recipe in FP8_RECIPES),
    *(_low_precision("fp4", recipe) for recipe in FP4_RECIPES),
    Feature(
        "gradient accumulation fusion in local layers", [*ON_GPU, _library(ACCUMULATES_GRADIENTS)]
    ),
    Feature(
        "asynchronous saves", MEGATRON_RUNS, _when("--async-save", lambda args: args.async_save)
    ),
    Feature(
        "asynchronous saves by NVIDIA's writer",
        [*MEGATRON_RUNS, _library(RESILIENCY)],
        _when(
            "--async-strategy nvrx", lambda args: args.async_save and args.async_strategy == "nvrx"
        ),
    ),
    Feature(
        "HybridModel",
        MEGATRON_RUNS,
        _when("--mdm-model hybrid", lambda args: args.hybrid_layer_pattern),
    ),
    Feature(
        "TensorBoard",
        [_library(TENSORBOARD)],
        _when("--tensorboard-dir", lambda args: args.tensorboard_dir),
    ),
    Feature(
        "Hugging Face tokenizers, and conversion with --verify",
        [_library(TRANSFORMERS)],
        _when(
            "--tokenizer-type HuggingFaceTokenizer",
            lambda args: args.tokenizer_type == "HuggingFaceTokenizer",
        ),
    ),
    Feature(
        "from_pretrained on the released code of LLaDA, LLaDA-MoE and Dream",
        [_library(TRANSFORMERS), _released_code],
    ),
    Feature("tasks of lm-evaluation-harness", [*MEGATRON_RUNS, _library(LM_EVAL)]),
    Feature("pictures", [_library(MATPLOTLIB)]),
)
