"""A kept result depends on the program, the flags, and the files that the flags name."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from megatron_mdm.errors import UserError
from megatron_mdm.experiments import runs
from megatron_mdm.experiments.program import program, program_in
from megatron_mdm.experiments.runs import run_cached, run_path
from tests import ROOT, ranks


def git(directory, *words):
    who = ["-c", "user.name=me", "-c", "user.email=me@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(directory), *who, *words], check=True, capture_output=True)


@pytest.fixture
def package(tmp_path):
    """A directory that holds a package of this name."""
    root = tmp_path / "repository"
    for name in ("megatron_mdm/__init__.py", "megatron_mdm/mcore/model.py", "tools/run.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    return root


def changed(package, name, text):
    """The program's name with another content of a file, which is restored afterwards."""
    path = package / name
    before = path.read_text() if path.exists() else None
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    found = program_in(package)
    path.unlink()
    if before is not None:
        path.write_text(before)
    return found


@pytest.mark.parametrize("is_top", [True, False])
def test_a_checkout_is_its_commit_and_what_is_not_committed(package, is_top):
    top = package if is_top else package.parent
    git(top, "init")
    assert program_in(package).startswith("files ")  # nothing is committed yet
    git(top, "add", ".")
    assert program_in(package).startswith("files ")
    git(top, "commit", "-m", "one")
    clean = program_in(package)
    assert clean.startswith("commit ") and "," not in clean
    assert changed(package, "README.md", "text") == clean
    assert changed(package, "tests/test_x.py", "x = 1") == clean
    found = [
        clean,
        changed(package, "megatron_mdm/mcore/model.py", "x = 1"),
        changed(package, "megatron_mdm/mcore/model.py", "x = 2"),
        changed(package, "megatron_mdm/new.py", "x = 1"),
        changed(package, "examples/new.py", "x = 1"),
    ]
    (package / "tools/run.py").unlink()
    found.append(program_in(package))
    git(top, "commit", "-am", "two")
    found.append(program_in(package))
    assert len(set(found)) == len(found)
    assert all(one.startswith(clean + ", changes ") for one in found[1:-1])


def test_an_installed_package_is_its_files(package, monkeypatch):
    first = program_in(package)
    assert first.startswith("files ") and program_in(package) == first
    assert changed(package, "megatron_mdm/mcore/model.py", "x = 1") != first
    # The package is inside a checkout of something else.
    git(package, "init")
    (package / "other").write_text("")
    git(package, "add", "other")
    git(package, "commit", "-m", "one")
    assert program_in(package) == first
    monkeypatch.setenv("PATH", "")  # without git
    assert program_in(package) == first


def test_a_result_is_of_one_program_and_of_one_content(tmp_path, monkeypatch):
    ranks.write_documents(tmp_path / "text", ranks.random_documents(3))
    (tmp_path / "density.json").write_text("{}")
    flags = ["--data-path", str(tmp_path / "text"), "--file", str(tmp_path / "density.json")]
    results = tmp_path / "results"
    results.mkdir()

    def work(path):
        return {"value": len(list(results.iterdir()))}

    first = run_cached(results, flags, work)
    assert first["program"] == program() and run_cached(results, flags, work) == first
    names = [run_path(results, flags)]
    ranks.write_documents(tmp_path / "text", ranks.random_documents(4))
    names.append(run_path(results, flags))
    (tmp_path / "density.json").write_text("[]")
    names.append(run_path(results, flags))
    (tmp_path / "tokenizer").mkdir()
    flags += ["--tokenizer-model", str(tmp_path / "tokenizer")]
    names.append(run_path(results, flags))
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    names.append(run_path(results, flags))
    for name in ("program", "program_now"):
        monkeypatch.setattr(runs, name, lambda: "another")
    names.append(run_path(results, flags))
    names += [run_path(results, flags[:-1]), run_path(results, [" ".join(flags)])]
    assert len(set(names)) == len(names)
    assert run_cached(results, flags, work)["value"] == 1


def test_a_result_of_a_program_that_has_changed_is_not_kept(tmp_path, monkeypatch):
    """Each run reads the code from the disk when it starts."""
    monkeypatch.setattr(runs, "program_now", lambda: "another")
    with pytest.raises(UserError, match="the program has changed since these runs began"):
        run_cached(tmp_path, ["--flag"], lambda path: {"value": 1})
    assert not list(tmp_path.iterdir())


def test_the_program_stays_what_it_was_when_the_process_began():
    code = (
        "import pathlib\n"
        "from megatron_mdm.experiments import program as module\n"
        "first = module.program()\n"
        "module.program_in = lambda root: 'another'\n"
        "assert module.program() == first != 'another'\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_a_run_ends_with_a_driver_that_is_killed(tmp_path):
    script, started = tmp_path / "run.py", tmp_path / "pid"
    script.write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'part')!r}).write_text(str(os.getpid()))\n"
        f"os.rename({str(tmp_path / 'part')!r}, {str(started)!r})\n"
        "time.sleep(600)\n"
    )
    code = (
        "import pathlib\n"
        "from megatron_mdm.experiments.runs import run_python\n"
        f"run_python([{str(script)!r}], pathlib.Path({str(tmp_path / 'log')!r}), 'a run')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        _wait(started.exists)
    finally:
        driver.kill()
        driver.wait()
    _wait(lambda: not _is_alive(int(started.read_text())))


def _is_alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _wait(is_so):
    end = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.1)
