"""Outputs are complete or absent, and any program can read their JSON."""

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

from megatron_mdm import files
from megatron_mdm.errors import UserError
from megatron_mdm.files import (
    complete_or_absent,
    new_directory,
    remove_abandoned,
    set_aside,
    termination_raises,
    write_json,
)
from tests import ROOT


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
    """Threads, and processes in two containers, may have the same process id."""
    path = tmp_path / "index.npy"
    with complete_or_absent(str(path)) as (one,):
        with open(one, "w") as file:
            with complete_or_absent(str(path)) as (other,), open(other, "w") as theirs:
                theirs.write("other")
            file.write("one")
        assert path.read_text() == "other"
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_set_that_cannot_be_renamed_leaves_none_of_it(tmp_path, monkeypatch):
    paths = [str(tmp_path / name) for name in ("o.bin", "o.json")]

    def replace(name, target, rename=os.replace):
        if target == paths[1]:
            raise OSError(28, "No space left on device")
        rename(name, target)

    monkeypatch.setattr(files.os, "replace", replace)
    line = "cannot write .*o.bin: No space left"
    with pytest.raises(UserError, match=line), complete_or_absent(*paths):
        pass
    assert os.listdir(tmp_path) == []


def killed(code, *arguments):
    """Runs code, in which `kill()` sends SIGKILL, in its own process."""
    begin = (
        "import os, sys\nfrom megatron_mdm.files import *\nkill = lambda: os.kill(os.getpid(), 9)\n"
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


def test_what_another_host_writes_stays_for_a_day(tmp_path, monkeypatch):
    """Its locks may be invisible here."""
    path = str(tmp_path / "d")
    killed("with new_directory(sys.argv[1]): kill()", path)
    (left,) = os.listdir(tmp_path)
    monkeypatch.setattr(files, "kernel_id", lambda: "01234567")
    remove_abandoned(path)
    assert os.listdir(tmp_path) == [left]
    later = time.time() + 24 * 3600 + 60
    monkeypatch.setattr(files.time, "time", lambda: later)
    (tmp_path / left / "part").touch()
    monkeypatch.setattr(files.os, "lstat", _with_change(files.os.lstat, "part", later - 10))
    remove_abandoned(path)
    assert os.listdir(tmp_path) == [left]
    monkeypatch.undo()
    monkeypatch.setattr(files, "kernel_id", lambda: "01234567")
    monkeypatch.setattr(files.time, "time", lambda: later)
    remove_abandoned(path)
    assert os.listdir(tmp_path) == []


def _with_change(lstat, name, when):
    """An os.lstat that gives this time as the last change of files with this name."""

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


@pytest.fixture
def replaced_link(tmp_path):
    """A link to a user's directory that holds a file."""
    (tmp_path / "user").mkdir()
    (tmp_path / "user/file").touch()
    link = tmp_path / "d"
    link.symlink_to("user")
    return link


def test_a_link_is_set_aside_and_not_its_directory(tmp_path, replaced_link):
    with pytest.raises(KeyboardInterrupt), set_aside(str(replaced_link)):
        assert sorted(os.listdir(tmp_path))[1:] == ["user"]
        raise KeyboardInterrupt
    assert os.readlink(replaced_link) == "user"
    with set_aside(str(replaced_link)), new_directory(str(replaced_link)):
        pass
    assert not replaced_link.is_symlink() and os.listdir(replaced_link) == []
    assert sorted(os.listdir(tmp_path)) == ["d", "user"]
    assert os.listdir(tmp_path / "user") == ["file"]


def test_a_link_that_a_killed_run_had_set_aside(tmp_path, replaced_link):
    killed("with set_aside(sys.argv[1]): kill()", replaced_link)
    remove_abandoned(str(replaced_link))
    assert os.readlink(replaced_link) == "user"
    code = "with set_aside(sys.argv[1]):\n with new_directory(sys.argv[1]): pass\n kill()"
    killed(code, replaced_link)
    remove_abandoned(str(replaced_link))
    assert sorted(os.listdir(tmp_path)) == ["d", "user"] and not replaced_link.is_symlink()
    assert os.listdir(tmp_path / "user") == ["file"]


def test_what_was_set_aside_and_cannot_be_removed_is_named(tmp_path, monkeypatch):
    path = tmp_path / "d"
    path.mkdir()

    def fail(*_):
        raise OSError(30, "Read-only file system")

    line = "cannot write .*/d: Read-only file system"
    with pytest.raises(UserError, match=line), set_aside(str(path)):
        monkeypatch.setattr(files.shutil, "rmtree", fail)


def test_what_took_the_place_of_a_directory_stays_after_a_failure(tmp_path):
    """The new directory may be another process's, and is complete."""
    path = tmp_path / "d"
    path.mkdir()
    with pytest.raises(KeyboardInterrupt), set_aside(str(path)):
        with new_directory(str(path)) as temporary:
            Path(temporary, "new").touch()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["d"] and os.listdir(path) == ["new"]


def test_what_earlier_versions_left_stays_for_a_day(tmp_path, monkeypatch):
    """Earlier versions took no locks."""
    for name in ("d.tmp-1234", "d.tmp-0123456789abcdef"):
        (tmp_path / name).touch()
    (tmp_path / "d.old-0123456789abcdef").mkdir()
    remove_abandoned(str(tmp_path / "d"))
    assert len(os.listdir(tmp_path)) == 3
    later = time.time() + 24 * 3600 + 60
    monkeypatch.setattr(files.time, "time", lambda: later)
    remove_abandoned(str(tmp_path / "d"))
    assert os.listdir(tmp_path) == ["d"] and (tmp_path / "d").is_dir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_raises_and_is_restored(number):
    signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
    with pytest.raises(SystemExit) as status, termination_raises():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert status.value.code == 128 + number
    assert signal.getsignal(number) is signal.SIG_DFL


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with termination_raises():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_interruption_of_the_renaming_leaves_no_mixture(tmp_path, monkeypatch, renames):
    targets = [str(tmp_path / "p.bin"), str(tmp_path / "p.idx")]
    for target in targets:
        Path(target).write_text("old")
    replace, done = os.replace, []

    def interrupted(source, target):
        if len(done) == min(renames, 1):
            if renames == 2:
                replace(source, target)
            raise KeyboardInterrupt
        done.append(replace(source, target))

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), complete_or_absent(*targets) as names:
        for name in names:
            Path(name).write_text("new")
    assert os.listdir(tmp_path) == []
