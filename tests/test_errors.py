"""Errors, and foreign names in them: one line, from one rank, without terminal codes."""

import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
from megatron.core import parallel_state
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_mdm import errors
from megatron_mdm.conversion.to_megatron import bash_quoted
from megatron_mdm.data.preprocess import PreprocessSummary
from megatron_mdm.data.tokenizer import TokenizerSummary
from megatron_mdm.errors import LostRankError, UserError, escaped, exit_with
from megatron_mdm.launch import reason

EVIL = "a\x1b]0;title\x07\x1b[31mred\nerror: forged\r\t\x85\u2028\u202e\udcff"
SHOWN = r"a\x1b]0;title\x07\x1b[31mred\nerror: forged\r\t\x85\u2028\u202e\udcff"


def test_what_is_not_printable_is_written_as_in_python():
    assert escaped(EVIL) == SHOWN == escaped(SHOWN)
    assert (
        escaped("d\u00e9j\u00e0 \u65e5\u672c \U0001f600 C:\\n")
        == "d\u00e9j\u00e0 \u65e5\u672c \U0001f600 C:\\n"
    )
    assert escaped("a\nb\tc\x07", kept="\n\t") == "a\nb\tc\\x07"


def test_an_error_is_one_line_wherever_it_goes(capsys):
    error = UserError(f"--input: {EVIL} does not exist")
    assert str(error) == f"--input: {SHOWN} does not exist"
    assert str(UserError(f"{error}; mend it")) == f"{error}; mend it"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    handed_on = f"Caught in a worker:\nTraceback\n{UserError.__module__}.UserError: {error}\n"
    assert str(UserError(handed_on)) == str(error)
    with pytest.raises(SystemExit):
        exit_with(error)
    assert capsys.readouterr().err == f"error: --input: {SHOWN} does not exist\n"


def test_summaries_show_names_escaped():
    bad = str(UserError(f"{EVIL}:1: bad JSON"))
    data = PreprocessSummary(EVIL, "uint16", 1, 1, 1, 1, 0, 1, [bad], seconds=1.0)
    tokenizer = TokenizerSummary(EVIL, 1, 1, 1, 1, 1, 1, 0, 1.0)
    lines = str(data).splitlines()
    assert (
        len(lines) == 4
        and lines[0].startswith(f"{SHOWN}.bin")
        and lines[3] == f"  {SHOWN}:1: bad JSON"
    )
    assert str(tokenizer).startswith(f"{SHOWN}: 1 pieces") and str(tokenizer).isprintable()


@pytest.mark.parametrize("word", ["plain", "a b'c", EVIL, "\\ ' \" $HOME `x` \n3", "\udcff\udcfe7"])
def test_a_launch_line_is_printable_and_means_what_it_should(word):
    quoted = bash_quoted(word)
    assert quoted.isprintable()
    code = "import os, sys; sys.stdout.buffer.write(os.fsencode(sys.argv[1]))"
    command = f"{sys.executable} -c '{code}' {quoted}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    assert run.stdout == os.fsencode(word)


def exit_output(monkeypatch, capsys, message, connected, **environment):
    monkeypatch.setattr(parallel_state, "_DATA_PARALLEL_GROUP", object() if connected else None)
    monkeypatch.setattr(errors.time, "sleep", lambda seconds: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        errors.exit_rank_with(UserError(message))
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "connected, environment, printed",
    [
        (False, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "error: oh\n"),
        # The first rank had enough time to find the error too.
        (False, {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "error: rank 1: oh\n"),
        (False, {"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "16"}, "error: oh\n"),
        (True, {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "error: rank 1: oh\n"),
        (True, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "error: oh\n"),
    ],
)
def test_who_prints(connected, environment, printed, monkeypatch, capsys):
    assert exit_output(monkeypatch, capsys, "oh", connected, **environment) == printed


def test_a_launcher_stops_a_rank_that_waits_for_the_first_one():
    """This works even if the program handles SIGTERM in its own way."""
    code = (
        "import signal\n"
        "from megatron_mdm.errors import UserError, exit_rank_with\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "print('ready', flush=True)\n"
        "exit_rank_with(UserError('oh'))"
    )
    environment = {**os.environ, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as process:
        process.stdout.readline()
        while process.poll() is None:
            process.terminate()
            time.sleep(0.05)
        assert process.returncode == -signal.SIGTERM
        assert process.stderr.read() == b""


def test_the_message_of_a_loader_worker_is_one_line():
    text = (
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        'last):\n  File "x.py", line 1\nmegatron_mdm.errors.UserError: row 3 contains it\n'
    )
    assert str(UserError(text)) == "row 3 contains it"


def fail_after(error, directory, monkeypatch):
    """(what rank 1 of 2 reports to torchrun, its status). None: Python shows the traceback."""
    file = directory / "1" / "error.json"
    file.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(errors.time, "time", lambda: 100.5)
    try:
        raise error
    except type(error):
        try:
            errors.exit_rank_after(error)
            status = None
        except SystemExit as end:
            status = end.code
    return ProcessFailure(1, 7, 1, str(file)), status


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("a bug\nof two lines"), "RuntimeError: a bug"),
        (KeyError(), "KeyError: "),
    ],
)
def test_the_first_rank_that_fails_shows_its_traceback(error, line, tmp_path, monkeypatch, capsys):
    failure, status = fail_after(error, tmp_path, monkeypatch)
    assert status is None and capsys.readouterr().err == ""
    assert failure.timestamp == 100
    assert failure.message["message"] == f"rank 1: {line}"
    report = ChildFailedError("program", {1: failure}).format_msg()
    assert f"traceback : rank 1: {line}" in report and "Traceback" not in report
    assert "in fail_after" in failure.message["extraInfo"]["traceback"]


def test_a_rank_that_has_lost_another_one_shows_a_line(tmp_path, monkeypatch, capsys):
    """A killed rank writes nothing and is noticed later, but its failure must count as earlier."""
    failure, status = fail_after(LostRankError("iteration 5: gone"), tmp_path, monkeypatch)
    assert status == 1 and failure.timestamp == 102
    assert capsys.readouterr().err == "rank 1: iteration 5: gone\n"
    assert failure.message["message"] == "rank 1: iteration 5: gone"
    assert "in fail_after" in failure.message["extraInfo"]["traceback"]


def test_a_rank_that_fails_after_another_one_shows_a_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "error.json").touch()
    failure, status = fail_after(RuntimeError("gone\x1b[2J\nx"), tmp_path, monkeypatch)
    line = r"rank 1: RuntimeError: gone\x1b[2J"
    assert status == 1 and failure.timestamp == 102
    assert capsys.readouterr().err == f"{line}\n"
    assert failure.message["message"] == line


def test_a_rank_without_a_file_of_its_own_has_no_neighbours(tmp_path, monkeypatch, capsys):
    """With `--log-dir /dev/null`, torchrun names no file."""
    (tmp_path / "0").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "")
    assert errors.exit_rank_after(RuntimeError("a bug")) is None
    assert capsys.readouterr().err == ""


def test_a_report_is_whole_or_absent(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setattr(errors.json, "dump", full)
    with pytest.raises(SystemExit):
        exit_with(UserError("oh"))
    assert capsys.readouterr().err == "error: oh\n"
    assert not file.exists()


def test_torchrun_reports_the_line_of_a_mistake(tmp_path, monkeypatch, capsys):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(SystemExit):
        exit_with(UserError("oh"))
    assert capsys.readouterr().err == "error: oh\n"
    assert ProcessFailure(0, 7, 2, str(file)).message["message"] == "oh"


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (-9, "rank 3 (process 7) was ended by SIGKILL, as the kernel does when memory runs out"),
        (-11, "rank 3 (process 7) was ended by SIGSEGV"),
        (3, "rank 3 (process 7) ended with status 3"),
    ],
)
def test_a_rank_that_left_no_word(status, line):
    assert reason(3, ProcessFailure(1, 7, status, "none")) == line
