"""Tests that start processes are recognised before they run and while they run."""

import subprocess
import sys

import pytest

from tests import ranks
from tests.ranks import launcher
from tests.tiers import LONG, starts_processes


def start_ranks():
    ranks.launch("directory", 1)


def start_a_program():
    return subprocess.run(["true"])


def start_by_another():
    def work():
        return start_ranks()

    return [work]


def start_itself(depth):
    return start_itself(depth - 1) if depth else start_a_program()


def only_the_flags():
    return [*ranks.MODEL, ranks.random_documents]


@pytest.mark.parametrize(
    "function",
    [start_ranks, start_a_program, start_by_another, start_itself, ranks.run_tool, ranks.fit_ppots],
)
def test_a_function_that_leads_to_a_start(function):
    assert starts_processes(function)
    assert starts_processes(only_the_flags, lambda: function)


def test_others():
    assert not starts_processes(only_the_flags, ranks.write_documents, print)


def test_the_mark_is_set(request):
    assert request.node.get_closest_marker("ranks") is None


@pytest.mark.usefixtures("base")
def test_the_mark_comes_with_a_fixture(request):
    assert request.node.get_closest_marker("ranks")


@pytest.fixture
def several_runs():
    """Refers to a group with several runs, without starting one."""
    return ranks.launch_layouts


def test_a_test_has_the_time_that_its_groups_have(request):
    assert request.node.get_closest_marker("timeout") is None
    assert float(request.config.getini("timeout")) > launcher.TIMEOUT
    assert 3 * launcher.TIMEOUT_OF_SEVERAL + launcher.TIMEOUT <= LONG


@pytest.mark.usefixtures("several_runs")
def test_more_time_comes_with_a_fixture(request):
    assert request.node.get_closest_marker("timeout").args == (LONG,)


def test_a_hidden_start_fails(tmp_path):
    hidden = __import__("subprocess")
    hidden.run(["true"], check=True)
    with pytest.raises(pytest.fail.Exception, match="add @pytest.mark.ranks"):
        hidden.run([sys.executable, "-c", ""])
    with pytest.raises(pytest.fail.Exception, match="add @pytest.mark.ranks"):
        vars(ranks)["launch"](tmp_path, 1)
    with pytest.raises(pytest.fail.Exception, match="add @pytest.mark.ranks"):
        vars(ranks)["run_forked"]("tools/generate.py")
