"""Preprocessed files are complete or absent, and existing files stay until then."""

import gzip
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_mdm.errors import UserError
from tests import ROOT
from tests.data.texts import SOURCE, TOOL, read, run, wait_for_the_end_of_group, write_jsonl


def test_existing_output_is_replaced_by_success_only(tmp_path, tokenizer, expected):
    (tmp_path / "old.bin").write_text("bin")
    (tmp_path / "old.idx").write_text("idx")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\nbad\n')
    with pytest.raises(UserError):
        run([str(bad)], tmp_path / "old", tokenizer)
    assert (tmp_path / "old.bin").read_text() + (tmp_path / "old.idx").read_text() == "binidx"
    run([write_jsonl(tmp_path / "a.jsonl", ["a"])], tmp_path / "old", tokenizer)
    assert read(tmp_path / "old") == expected(["a"])
    assert sorted(os.listdir(tmp_path)) == [
        "a.jsonl",
        "bad.jsonl",
        "old.bin",
        "old.idx",
        "old.json",
    ]


def test_output_is_kept_where_it_is_not_to_be_replaced(tmp_path, tokenizer, expected):
    """A run may have begun to train on it."""
    once = {"unless_done": True, "replace": False}
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    assert run([source], tmp_path / "out", tokenizer, **once).documents == 1
    assert run([source], tmp_path / "out", tokenizer, **once) is None
    write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    with pytest.raises(UserError, match=r"out.idx exists, and was made from other inputs or opti"):
        run([source], tmp_path / "out", tokenizer, **once)
    with pytest.raises(UserError, match=r"out.idx exists: give another --output-prefix, or rem"):
        run([source], tmp_path / "out", tokenizer, replace=False)
    assert read(tmp_path / "out") == expected(["a"])


def test_output_directory_is_made(tmp_path, tokenizer, expected):
    run([write_jsonl(tmp_path / "a.jsonl", ["a"])], tmp_path / "x" / "y" / "out", tokenizer)
    assert read(tmp_path / "x" / "y" / "out") == expected(["a"])


@pytest.mark.parametrize("target", ["out.bin", "out.idx"])
def test_target_that_cannot_be_replaced(tmp_path, tokenizer, target):
    (tmp_path / target).mkdir()
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(UserError, match=r"cannot write .*out\.bin: Is a directory"):
        run([source], tmp_path / "out", tokenizer)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", target]


def test_full_disk(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", [SOURCE] * 20)
    (tmp_path / "out.idx").write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"^cannot write .*out\.bin: File too large$"):
            run([source], tmp_path / "out", tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out.idx"]
    assert (tmp_path / "out.idx").read_text() == "old"


def test_killed_worker_ends_the_run(tmp_path, tokenizer):
    block = gzip.compress(json.dumps({"text": SOURCE * 5}).encode() + b"\n")
    source = tmp_path / "big.jsonl.gz"
    source.write_bytes(block * 1000)

    def kill():
        while not (children := multiprocessing.active_children()):
            time.sleep(0.02)
        time.sleep(0.5)
        os.kill(children[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(UserError, match="a worker process ended by signal 9"):
        run([str(source)], tmp_path / "out", tokenizer, workers=2)
    killer.join()
    assert os.listdir(tmp_path) == ["big.jsonl.gz"]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_interruption_leaves_nothing(tmp_path, model, number, status):
    block = gzip.compress(json.dumps({"text": SOURCE * 5}).encode() + b"\n")
    (tmp_path / "big.jsonl.gz").write_bytes(block * 1000)  # half a GB
    process = subprocess.Popen(
        [sys.executable, str(TOOL), "--input", "big.jsonl.gz", "--tokenizer-model", str(model),
         "--output-prefix", "out", "--workers", "2"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # The process that starts the tests may ignore the signal, and children inherit this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while not any(path.stat().st_size for path in tmp_path.glob("out.bin.tmp-*")):
        assert process.poll() is None
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # like a terminal
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == ["big.jsonl.gz"]
    wait_for_the_end_of_group(process.pid)
