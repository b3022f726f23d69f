"""Processes and threads that write or remove the same output wait for each other."""

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

from megatron_mdm import files
from megatron_mdm.files import (
    complete_or_absent,
    new_directory,
    remove_abandoned,
    set_aside,
    write_json,
)
from tests import ROOT


def test_two_that_write_a_set_at_once_leave_the_files_of_one(tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("o.bin", "o.idx", "o.json")]
    ready, go, moved = (threading.Event() for _ in range(3))

    def write(text, then=lambda: None):
        with complete_or_absent(*map(str, paths)) as names:
            for name in names:
                Path(name).write_text(text)
            then()

    def other():
        try:
            write("other", lambda: (ready.set(), go.wait()))
        finally:
            moved.set()

    def flock(*arguments, lock=fcntl.flock):
        if threading.current_thread() is thread and go.is_set():
            moved.set()  # it waits for the thread that renames
        return lock(*arguments)

    def replace(*names, rename=os.replace):
        rename(*names)
        if threading.current_thread() is not thread and not go.is_set():
            go.set()
            assert moved.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert ready.wait(60)
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(files.os, "replace", replace)
    write("one")
    thread.join()
    assert [path.read_text() for path in paths] == ["other"] * 3
    assert sorted(tmp_path.iterdir()) == paths


def test_what_a_living_process_writes_stays(tmp_path):
    """Outputs of another process and of another thread stay until the writer ends, in any way."""
    path = tmp_path / "x"
    code = (
        "import sys\nfrom megatron_mdm.files import *\n"
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


def test_a_directory_that_is_exchanged_before_its_lock_is_taken(tmp_path, monkeypatch):
    """The lock is then that of the new directory, so nobody takes this one for abandoned."""
    path = tmp_path / "d"
    path.mkdir()
    exchanged = []

    def flock(*arguments, lock=fcntl.flock):
        if not exchanged:
            exchanged.append(path.rename(tmp_path / "other"))
            path.mkdir()
        return lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", flock)
    with set_aside(str(path)):
        remove_abandoned(str(path))
        assert exchanged and not path.exists()
    assert os.listdir(tmp_path) == ["other"]
    with set_aside(str(path)):  # the directory is gone
        path.mkdir()
    assert path.exists()
