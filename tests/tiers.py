"""Which tests start processes: the mark `ranks`, found before they run and held while they run.

A test has the mark when its code, its fixtures' or that of a helper in tests/ refers to
a start of ranks or to `subprocess`. Code that hides it from this, such as a function in a table, is
found when the test runs: without the mark no test can start ranks, tools or scripts.

Tests that refer to a start of several runs in one group have more time than others, as those on a
GPU have: the groups that they wait for end themselves before.
"""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import pytest

from megatron_mdm.experiments.runs import run_python
from tests.ranks import server
from tests.ranks.launcher import launch_all

# What starts processes; workers of the data tools, which take a fraction of a second, are none.
STARTS = (subprocess, server.context, run_python)
HINT = "a test that starts ranks, tools or scripts needs the mark `ranks`: add @pytest.mark.ranks"
# Others, such as git, end within milliseconds.
STARTED = ("python", "bash", "sh", "torchrun")

# Seconds for a test with its fixtures: three groups of several runs, and one more run, that hang.
LONG = 1800

_running: list[pytest.Item] = []


def mark(items: list[pytest.Item]) -> None:
    """Marks those of the tests that start processes, and those that may take long."""
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        functions = [item.obj, *(fixture.func for found in fixtures for fixture in found)]
        if starts_processes(*functions):
            item.add_marker("ranks")
        if refer_to([launch_all], *functions) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LONG))


def starts_processes(*functions: Callable) -> bool:
    """Whether tests, fixtures or helpers, or functions of tests/ that they refer to, do so."""
    return refer_to(STARTS, *functions)


def refer_to(values: Iterable[object], *functions: Callable) -> bool:
    """Whether one of the values is in functions, or in functions of tests/ that they refer to."""
    found, seen = list(functions), set()
    while found:
        value = found.pop()
        if any(value is start for start in values):
            return True
        function = inspect.unwrap(value) if callable(value) else value
        function = getattr(function, "__func__", function)
        if not isinstance(function, FunctionType) or not function.__module__.startswith("tests."):
            continue
        if function not in seen:
            seen.add(function)
            found += _referred(function)
    return False


def _referred(function: FunctionType) -> Iterator[object]:
    """Values of the names in a function: globals, those of its closure, attributes of modules."""
    names = set(_names(function.__code__))
    values = [function.__globals__[name] for name in names if name in function.__globals__]
    for cell in function.__closure__ or ():
        values.append(cell.cell_contents)
    for value in values:
        yield value
        if isinstance(value, ModuleType) and value.__name__.startswith("tests."):
            yield from (vars(value)[name] for name in names if name in vars(value))
        if inspect.isclass(value):
            yield from vars(value).values()


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Notes which test runs, its fixtures too."""
    _running.append(item)
    try:
        return (yield)
    finally:
        _running.pop()


def _refuse(event: str, args: tuple) -> None:
    """Fails a test without the mark that starts ranks, tools or scripts."""
    if event not in (server.EVENT, "subprocess.Popen") or not _running:
        return
    if event == "subprocess.Popen" and not Path(os.fsdecode(args[0])).name.startswith(STARTED):
        return
    if _running[-1].get_closest_marker("ranks") is None:
        pytest.fail(HINT)


sys.addaudithook(_refuse)
