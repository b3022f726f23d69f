"""Tasks of lm-evaluation-harness: their names, their data, and what is written of the results.

Imports neither torch nor megatron, and `lm_eval` itself only where it is needed.
"""

import difflib
import importlib.util
import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_mdm.errors import UserError
from megatron_mdm.files import write_json, write_text

MODEL = "mdm"


def register() -> None:
    """Makes the model `mdm` known to lm_eval; does nothing where that is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        return
    from lm_eval.api.registry import model_registry

    model_registry.register(MODEL, target="megatron_mdm.lm_eval.checkpoint_model:CheckpointModel")


def task_manager(include_path: str | None = None) -> Any:
    """lm_eval's index of tasks, which takes seconds to make.

    Args:
        include_path: directory with .yaml files of other tasks.

    Raises:
        UserError: lm_eval is missing, or there is no such directory.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness: pip install 'megatron-mdm[eval]'")
    if include_path is not None and not os.path.isdir(include_path):
        raise UserError(f"--include-path {include_path} is no directory: name that of the tasks")
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def load_tasks(manager: Any, names: Sequence[str], run_unsafe_code: bool = False) -> list[Any]:
    """Loads tasks, groups and tags with their data, as `lm_eval.simple_evaluate` takes them.

    Args:
        manager: see `task_manager`.
        names: of tasks, groups and tags, in which * stands for anything, or .yaml files. One may
            hold several, with commas between.
        run_unsafe_code: whether tasks may run the code that the model writes.

    Raises:
        UserError: there is no such task, its data cannot be loaded, or it needs what is not
            allowed.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    # Some tasks shuffle while they are loaded. As `simple_evaluate` seeds before it loads tasks.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    if run_unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metrics of these tasks ask for it too
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
        except Exception as error:  # whatever a task's own code, or a library for its data, raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"--tasks {name} cannot be loaded: {reason}") from error
        for task in loaded["tasks"].values():
            _check_task(task.task_name, task.dump_config(), run_unsafe_code)
        outermost = loaded["groups"].get(name)
        chosen += [outermost] if outermost else loaded["tasks"].values()
    return chosen


def _check_task(name: str, config: Mapping[str, Any], run_unsafe_code: bool) -> None:
    """Checks that a task can be asked and may do all that it does.

    Raises:
        UserError: it cannot, or may not.
    """
    if config.get("unsafe_code") and not run_unsafe_code:
        raise UserError(
            f"--tasks {name} runs code that the model writes: add --confirm-run-unsafe-code where "
            "that code can do no harm"
        )
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        raise UserError(f"--tasks {name} shows pictures or plays sounds: the model reads text")


def generation_settings(given: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Reads settings of generated texts, as tasks have them in `generation_kwargs`.

    Args:
        given: names and values, which are numbers, true, false, none, or else text. The value of
            `until` is text as it stands, and each one is another string that ends a text.
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
    """Has a model answer tasks, all of whose requests are checked before the first is answered.

    Args:
        model: a `HarnessModel`.
        tasks: of `load_tasks`.
        manager: see `task_manager`.
        settings: of `lm_eval.simple_evaluate`.

    Returns:
        Results as lm_eval has them; None on all ranks of a machine but the first.

    Raises:
        UserError: the questions of a task cannot be written, or the model cannot answer them.
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
        # The attribute is not there before the questions are written.
        unwritten = [task for task in chosen if not getattr(task, "instances", None)]
        if not unwritten:  # a fault of what came later
            raise
        # Whatever a task's own code raises, and lm_eval where there are too few examples.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        shots = unwritten[0].config.num_fewshot
        how = f" with {shots} examples (--num-fewshot)" if shots else ""
        raise UserError(
            f"--tasks {unwritten[0].task_name} cannot be asked{how}: {reason}"
        ) from error
    return results


def write_results(path: str, results: dict[str, Any]) -> None:
    """Writes results as lm_eval does, without the answers; null where they hold no number.

    Raises:
        UserError: the file cannot be written.
    """
    shown = {key: value for key, value in results.items() if key != "samples"}
    write_json(path, json.loads(_json(shown), parse_constant=lambda _: None))


def write_samples(path: str, results: dict[str, Any]) -> None:
    """Writes a line of JSON for every question, with what the model was asked and answered.

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
    """Writes a value of lm_eval as JSON; it may hold functions and numpy's numbers."""
    from lm_eval.utils import handle_non_serializable

    return json.dumps(value, default=handle_non_serializable, ensure_ascii=False)
