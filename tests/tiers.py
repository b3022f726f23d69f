"""Finds the tests that start processes, gives them the mark `ranks`, and holds them to it.

A test gets the mark if its code, the code of its fixtures or that of a helper in tests/ refers to a
function that starts ranks, or to `subprocess`. This search does not see a reference that is hidden,
for example in a table of functions. Such a test fails when it runs, because no test without the
mark can start ranks, tools or scripts.

Tests that refer to `launch_all`, which starts several runs in one group of ranks, get a longer
timeout, as tests on a GPU do. The groups that they wait for have shorter timeouts of their own.
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

# The functions that start processes. Workers of the data tools take a fraction of a second and do
# not count.
STARTS = (subprocess, server.context, run_python)
HINT = "a test that starts ranks, tools or scripts needs the mark `ranks`: add @pytest.mark.ranks"
# Programs that count. Others, such as git, end within milliseconds.
STARTED = ("python", "bash", "sh", "torchrun")

# Timeout in seconds of a test with its fixtures. It covers three groups of several runs, and one
# more run, that all hang.
LONG = 1800

_running: list[pytest.Item] = []


def mark(items: list[pytest.Item]) -> None:
    """Marks the tests that start processes, and gives more time to those that may take long."""
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        functions = [item.obj, *(fixture.func for found in fixtures for fixture in found)]
        if starts_processes(*functions):
            item.add_marker("ranks")
        if refer_to([launch_all], *functions) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LONG))


def starts_processes(*functions: Callable) -> bool:
    """Whether functions, or functions of tests/ that they refer to, start processes."""
    return refer_to(STARTS, *functions)


def refer_to(values: Iterable[object], *functions: Callable) -> bool:
    """Whether functions, or functions of tests/ that they refer to, refer to one of the values."""
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
    """Yields the values of all names in a function.

    They are globals, variables of its closure, attributes of test modules, and members of classes.
    """
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
    """Notes which test runs, including its fixtures."""
    _running.append(item)
    try:
        return (yield)
    finally:
        _running.pop()


def _refuse(event: str, args: tuple) -> None:
    """Fails a test that starts ranks, tools or scripts without having the mark."""
    if event not in (server.EVENT, "subprocess.Popen") or not _running:
        return
    if event == "subprocess.Popen" and not Path(os.fsdecode(args[0])).name.startswith(STARTED):
        return
    if _running[-1].get_closest_marker("ranks") is None:
        pytest.fail(HINT)


sys.addaudithook(_refuse)
