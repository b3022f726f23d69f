"""Outputs are whole, and JSON that any program reads."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_mdm.data import outputs
from megatron_mdm.data.outputs import (
    complete_or_absent,
    new_directory,
    remove_abandoned,
    write_json,
)
from megatron_mdm.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_json_cannot_say_is_not_written(value, tmp_path):
    path = tmp_path / "result.json"
    write_json(str(path), {"a": [1.5, None]})
    assert json.loads(path.read_text()) == {"a": [1.5, None]}
    with pytest.raises(UserError, match="result.json: a result is NaN or infinite"):
        write_json(str(path), {"a": [value]})
    assert json.loads(path.read_text()) == {"a": [1.5, None]}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_two_that_write_one_file_at_once_do_not_meet(tmp_path):
    """Threads, and processes of two containers, may have the same process id."""
    path = tmp_path / "index.npy"
    with complete_or_absent(str(path)) as (one,):
        with open(one, "w") as file:
            with complete_or_absent(str(path)) as (other,), open(other, "w") as theirs:
                theirs.write("other")
            file.write("one")
        assert path.read_text() == "other"
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def killed(code, *arguments):
    """Runs code, in which `kill()` is SIGKILL's, in a process of its own."""
    begin = (
        "import os, sys\n"
        "from megatron_mdm.data.outputs import *\n"
        "kill = lambda: os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", begin + code, *map(str, arguments)]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL


def test_the_next_run_removes_what_a_killed_one_left(tmp_path):
    one, two, directory = (str(tmp_path / name) for name in ("a[1].bin", "a[1].idx", "d"))
    killed("with complete_or_absent(*sys.argv[1:]): kill()", one, two)
    killed(
        "with new_directory(sys.argv[1]) as name:\n open(name + '/part', 'w').close(); kill()",
        directory,
    )
    others = ["a1.bin.tmp-0", "a[1].bin.tmp-notes", "a[1].bin2.tmp-01234567-0123456789abcdef"]
    for name in others:
        (tmp_path / name).touch()
    assert len(os.listdir(tmp_path)) == 6
    with complete_or_absent(one) as (mine,):
        mine = os.path.basename(mine)
        left = {p.name.partition(".tmp")[0] for p in tmp_path.iterdir() if p.name not in others}
        assert left == {"a[1].bin", "a[1].idx", "d"} and (tmp_path / mine).exists()
    with complete_or_absent(one, two):
        pass
    with new_directory(directory):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "a[1].bin", "a[1].idx", "d"])


def test_what_a_living_process_writes_stays(tmp_path):
    """Another process, and another thread of this one; until it ends, however it does."""
    path = tmp_path / "x"
    code = (
        "import sys\nfrom megatron_mdm.data.outputs import *\n"
        "with complete_or_absent(sys.argv[1]), new_directory(sys.argv[1] + 'd'):\n"
        " print('ready', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT, **pipes) as other:
        other.stdout.readline()
        with new_directory(str(tmp_path / "dd")):
            before = set(os.listdir(tmp_path))
            for name in ("x", "xd", "dd"):
                remove_abandoned(str(tmp_path / name))
            assert set(os.listdir(tmp_path)) == before and len(before) == 3
        other.kill()
        other.wait()
    write_json(str(path), 1)
    remove_abandoned(f"{path}d")
    assert sorted(os.listdir(tmp_path)) == ["dd", "x"]


def test_what_another_host_writes_stays_for_a_day(tmp_path, monkeypatch):
    """Whose locks may not be seen here."""
    path = str(tmp_path / "d")
    killed("with new_directory(sys.argv[1]): kill()", path)
    (left,) = os.listdir(tmp_path)
    monkeypatch.setattr(outputs, "_kernel", lambda: "01234567")
    remove_abandoned(path)
    assert os.listdir(tmp_path) == [left]
    later = time.time() + 24 * 3600 + 60
    monkeypatch.setattr(outputs.time, "time", lambda: later)
    (tmp_path / left / "part").touch()
    monkeypatch.setattr(outputs.os, "lstat", _with_change(outputs.os.lstat, "part", later - 10))
    remove_abandoned(path)
    assert os.listdir(tmp_path) == [left]
    monkeypatch.undo()
    monkeypatch.setattr(outputs, "_kernel", lambda: "01234567")
    monkeypatch.setattr(outputs.time, "time", lambda: later)
    remove_abandoned(path)
    assert os.listdir(tmp_path) == []


def _with_change(lstat, name, when):
    """os.lstat, by which files of this name were last changed at this time."""

    def changed(path):
        found = lstat(path)
        return SimpleNamespace(st_ctime=when) if str(path).endswith(name) else found

    return changed


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_directory_that_a_killed_run_had_set_aside_comes_back(tmp_path, is_replaced):
    path = tmp_path / "d"
    path.mkdir()
    (path / "old").touch()
    code = "with set_aside(sys.argv[1]):\n"
    if is_replaced:
        code += " with new_directory(sys.argv[1]): pass\n"
    killed(f"{code} kill()", path)
    assert path.exists() == is_replaced and len(os.listdir(tmp_path)) == 1 + is_replaced
    remove_abandoned(str(path))
    assert os.listdir(tmp_path) == ["d"]
    assert os.listdir(path) == ([] if is_replaced else ["old"])
