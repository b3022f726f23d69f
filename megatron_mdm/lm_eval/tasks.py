"""Tasks of lm-evaluation-harness: loads them by name, runs them, and writes their results.

This module imports neither torch nor megatron, and imports `lm_eval` only when it is needed.
"""

import difflib
import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_mdm.errors import UserError
from megatron_mdm.files import write_json, write_text
from megatron_mdm.libraries import LM_EVAL

MODEL = "mdm"


def register() -> None:
    """Registers the model `mdm` with lm_eval; does nothing if lm_eval is not installed."""
    if not LM_EVAL.is_installed():
        return
    from lm_eval.api.registry import model_registry

    model_registry.register(MODEL, target="megatron_mdm.lm_eval.checkpoint_model:CheckpointModel")


def task_manager(include_path: str | None = None) -> Any:
    """Builds lm_eval's index of tasks, which takes seconds.

    Args:
        include_path: directory with .yaml files of additional tasks.

    Raises:
        UserError: lm_eval is not installed, or the directory does not exist.
    """
    if not LM_EVAL.is_installed():
        raise UserError(f"--tasks needs {LM_EVAL.name}: {LM_EVAL.install}")
    if include_path is not None and not os.path.isdir(include_path):
        raise UserError(f"--include-path {include_path} is not a directory of tasks: give one")
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def load_tasks(manager: Any, names: Sequence[str], run_unsafe_code: bool = False) -> list[Any]:
    """Loads tasks, groups and tags with their data, as `lm_eval.simple_evaluate` takes them.

    Args:
        manager: see `task_manager`.
        names: names of tasks, groups and tags, with * as a wildcard, or .yaml files. An entry may
            contain several names, separated by commas.
        run_unsafe_code: whether tasks may run code that the model writes.

    Raises:
        UserError: a task does not exist, its data cannot be loaded, or the task runs code of the
            model without permission or needs pictures or sounds.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    # Some tasks shuffle when they are loaded. `simple_evaluate` sets these seeds before it loads
    # tasks.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    if run_unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metrics of these tasks require it too
    found: dict[str, None] = {}
    for name in [part for text in names for part in text.split(",") if part]:
        if name.endswith(".yaml") and os.path.isfile(name):
            found[name] = None
            continue
        matches = manager.match_tasks([name])
        if not matches:
            similar = difflib.get_close_matches(name, manager.all_tasks)
            meant = f"did you mean {', '.join(similar)}? " if similar else ""
            raise UserError(
                f"--tasks {name}: lm_eval has no such task: {meant}`lm_eval ls tasks` prints them, "
                "and --include-path adds a directory of others"
            )
        found.update(dict.fromkeys(matches))
    chosen: list[Any] = []
    for name in found:
        entry = manager.task_index.get(name)
        _check_task(name, (entry and entry.cfg) or {}, run_unsafe_code)
        try:
            loaded = manager.load([name])
        except Exception as error:  # the task's code and data libraries may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"--tasks {name} cannot be loaded: {reason}") from error
        for task in loaded["tasks"].values():
            _check_task(task.task_name, task.dump_config(), run_unsafe_code)
        outermost = loaded["groups"].get(name)
        chosen += [outermost] if outermost else loaded["tasks"].values()
    return chosen


def _check_task(name: str, config: Mapping[str, Any], run_unsafe_code: bool) -> None:
    """Checks that a task is text-only and runs code of the model only with permission.

    Raises:
        UserError: it is not text-only, or runs such code without permission.
    """
    if config.get("unsafe_code") and not run_unsafe_code:
        raise UserError(
            f"--tasks {name} runs code that the model writes: add --confirm-run-unsafe-code where "
            "that code can do no harm"
        )
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        raise UserError(f"--tasks {name} contains pictures or sounds: the model reads only text")


def generation_settings(given: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Parses generation settings into the form of a task's `generation_kwargs`.

    Args:
        given: names and values. A value that spells a number, true, false or none is converted;
            other values are text. Values of `until` are always text, and each one adds an end
            string.
    """
    from lm_eval.utils import handle_arg_string

    settings: dict[str, Any] = {}
    for name, value in given:
        if name == "until":
            settings.setdefault(name, []).append(value)
        else:
            settings[name] = handle_arg_string(value)
    return settings


def ask(model: Any, tasks: list[Any], manager: Any, **settings: Any) -> dict[str, Any] | None:
    """Evaluates a model on tasks; all requests are checked before the first one is answered.

    Args:
        model: a `HarnessModel`.
        tasks: the result of `load_tasks`.
        manager: see `task_manager`.
        settings: keyword arguments of `lm_eval.simple_evaluate`.

    Returns:
        lm_eval's results on the first rank of each machine, None on the other ranks.

    Raises:
        UserError: the questions of a task cannot be built, or the model cannot answer them.
    """
    from lm_eval import simple_evaluate

    chosen = manager.load(tasks)["tasks"].values()
    model.expect(lambda: [request for task in chosen for request in task.instances])
    try:
        results: dict[str, Any] | None = simple_evaluate(
            model=model, tasks=tasks, task_manager=manager, **settings
        )
    except UserError:
        raise
    except Exception as error:
        # A task has no instances until its questions are built.
        unwritten = [task for task in chosen if not getattr(task, "instances", None)]
        if not unwritten:  # the error occurred after all questions were built
            raise
        # The task's code may raise anything, and lm_eval raises if there are too few examples.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        shots = unwritten[0].config.num_fewshot
        how = f" with {shots} examples (--num-fewshot)" if shots else ""
        raise UserError(
            f"--tasks {unwritten[0].task_name}: cannot build the questions{how}: {reason}"
        ) from error
    return results


def write_results(path: str, results: dict[str, Any]) -> None:
    """Writes results in lm_eval's JSON format, without the answers; NaN and infinity become null.

    Raises:
        UserError: the file cannot be written.
    """
    shown = {key: value for key, value in results.items() if key != "samples"}
    write_json(path, json.loads(_json(shown), parse_constant=lambda _: None))


def write_samples(path: str, results: dict[str, Any]) -> None:
    """Writes a line of JSON for every question, with the prompts and answers of the model.

    Raises:
        UserError: the file cannot be written.
    """
    lines = [
        _json({"task": task, **sample})
        for task, samples in results["samples"].items()
        for sample in samples
    ]
    write_text(path, "".join(line + "\n" for line in lines))


def _json(value: Any) -> str:
    """Encodes a value from lm_eval as JSON; it may contain functions and NumPy numbers."""
    from lm_eval.utils import handle_non_serializable

    return json.dumps(value, default=handle_non_serializable, ensure_ascii=False)
