"""Runs that end by a signal or a death: the checkpoint, status, messages, leftover processes."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.training import get_args

from megatron_mdm.interruption import INTERRUPTED
from megatron_mdm.mcore.checkpoint import workers
from megatron_mdm.mcore.checkpoint.files import TRACKER, find_checkpoint
from megatron_mdm.mcore.checkpoint.integrity import check_sums
from megatron_mdm.mcore.checkpoint.writer import preload_copies
from megatron_mdm.mcore.training import objective as program
from megatron_mdm.pretrain import main
from tests import ranks

PATIENCE = 120.0  # seconds; usual waits take a few
SAVED = ["--async-save", "--save-interval", "2", "--train-iters", "6"]


def wait_for(condition, patience=PATIENCE):
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def left(directory):
    """Processes that hold a file open under the directory, as all processes of a run do."""
    found = []
    for process in psutil.process_iter():
        try:
            names = [os.readlink(f) for f in Path(f"/proc/{process.pid}/fd").iterdir()]
        except OSError:
            continue
        if any(name.startswith(str(directory)) for name in names):
            found.append(process.pid)
    return found


def interrupted() -> None:
    """Runs `ranks.train`; in the third iteration two signals reach the last rank and its group.

    A terminal and torchrun send such signals. The group consists of the rank's workers for data and
    checkpoints.
    """
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # the default of a fresh process

    def interrupt():
        assert len(multiprocessing.active_children()) == 3  # loader, writer and their queue
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(0, number)

    _at_forward(lambda: get_args().curr_iteration == 2, interrupt)
    ranks.train()


def loses_its_writer() -> None:
    """Runs the program; the last rank's checkpoint writer is killed during a later save.

    The writer is stopped until the rank waits for it.
    """

    def lose():
        writer = workers.CheckpointWorker._persistent_process
        os.kill(writer.pid, signal.SIGSTOP)
        threading.Timer(2.0, writer.kill).start()

    _at_forward(lambda: Path(get_args().save, TRACKER).exists(), lose)
    main()


def _at_forward(condition, act) -> None:
    """Makes the last rank act once, before the first forward pass in which the condition holds."""
    forward_step, done = program.forward_step, []

    def acting_forward_step(*args):
        is_last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
        if is_last and not done and condition():
            done.append(act())
        return forward_step(*args)

    program.forward_step = acting_forward_step


def test_a_run_that_is_interrupted_goes_on_bit_for_bit(base, tmp_path):
    """Checkpoints are written in the background, by a process that the signals reach as well."""
    whole = ranks.launch(tmp_path / "whole", 2, *base, *SAVED, "--save", str(tmp_path / "a"))
    save, directory = str(tmp_path / "b"), tmp_path / "first"
    command, loader = [*base, *SAVED, "--save", save], ["--num-workers", "1"]
    run = ranks.launch(directory, 2, *command, *loader, entry=interrupted, check=False)
    assert run.status == [INTERRUPTED] * 2, run.output
    assert "Traceback" not in "".join(run.output)
    assert "rank 1: SIGINT: the run ends after this iteration" in run.output[1]
    assert find_checkpoint(save).iteration == 3
    wait_for(lambda: not left(directory))
    second = ranks.launch(tmp_path / "second", 2, *command)
    first = ranks.read_scalars(directory / "tb")
    for name in ("mdm loss", "grad-norm"):
        assert first[name] + second.scalars[name] == whole.scalars[name]
    ours, theirs = ranks.weights(tmp_path / "b"), ranks.weights(tmp_path / "a")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_death_of_the_process_that_writes_a_checkpoint_ends_the_run(base, tmp_path):
    """It dies during a save, while its rank waits for it."""
    save, directory = str(tmp_path / "checkpoint"), tmp_path / "run"
    command = [*base, *SAVED, "--train-iters", "1000", "--save", save]
    run = ranks.launch(directory, 2, *command, entry=loses_its_writer, check=False)
    assert run.status[1] == 1 and run.status[0] != 0
    lines = [line for line in run.output[1].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in run.output[1]
    assert "rank 1: the process that writes checkpoints ended by signal 9" in lines[0]
    last = find_checkpoint(save)
    check_sums(last.path)
    assert last.path.name < max(path.name for path in Path(save).glob("iter_*"))
    wait_for(lambda: not left(directory))


def test_a_signal_while_the_interpreter_exits():
    """A rank that was told to stop ends with its own status, however late a signal arrives."""
    program = """
import os, signal
from megatron_mdm.interruption import INTERRUPTED, Interruption

class Last:
    def __del__(self, os=os, signal=signal):  # the interpreter has dropped its handlers by now
        assert not callable(signal.getsignal(signal.SIGTERM)) and os.write(1, b"late")
        for number in (signal.SIGTERM, signal.SIGUSR2):
            os.kill(os.getpid(), number)

last = Last()
with Interruption() as interruption:
    interruption.listen(signal.SIGUSR2)
    interruption.end()
    raise SystemExit(INTERRUPTED)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (INTERRUPTED, "late", "")


def test_a_rank_that_waits_in_c_for_one_that_has_gone():
    """A rank may block in a collective: torchrun's SIGTERM ends it, though no handler can run."""
    program = """
import ctypes
from megatron_mdm.interruption import Interruption

with Interruption() as interruption:
    interruption.has_begun = True
    mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    library.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    library.pthread_mutex_lock(mutex)
"""
    torchrun = {"TORCHELASTIC_RUN_ID": "run", "LOCAL_WORLD_SIZE": "1000"}  # most of them are gone
    with subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, **torchrun}, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            wait_for(lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 128 + signal.SIGTERM
        finally:
            process.kill()


def test_what_a_rank_shares_with_the_writer_is_copied():
    """The rank goes on training while the writer writes."""
    shared = torch.ones(3)
    buckets = [("name", "key", ([], [("item", shared)]))]
    buckets = preload_copies(FileSystemWriterAsync.preload_tensors, buckets, non_blocking=False)
    shared.zero_()
    assert buckets[0][2][1][0][1].tolist() == [1.0] * 3


@contextmanager
def launched(launcher, data, directory, *flags):
    """Two ranks that save after each iteration: (process of their launcher, log)."""
    save = str(directory / "checkpoint")
    command = [
        *[sys.executable, "-m", *launcher.split(), "--standalone", "--nproc-per-node", "2"],
        *["-m", "megatron_mdm.pretrain", *ranks.MODEL, *ranks.TOKENIZER, *ranks.TRAINING],
        *["--data-path", str(data), "--data-cache-path", str(directory / "cache")],
        *["--num-workers", "1", "--save", save, "--load", save, "--save-interval", "1", *flags],
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    log = directory / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        yield process, log
    finally:
        for pid in left(log):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("launcher", "number", "status"),
    [
        ("megatron_mdm.launch --max-restarts 2", signal.SIGTERM, INTERRUPTED),
        ("torch.distributed.run", signal.SIGUSR1, -signal.SIGUSR1),  # this signal kills torchrun
    ],
)
def test_a_signal_to_the_launcher(launcher, number, status, data, tmp_path):
    """Under torchrun itself, whose ranks are its children and have process groups of their own.

    No rank may be started again, because then the run would not end.
    """
    save = tmp_path / "checkpoint"
    with launched(launcher, data, tmp_path, "--train-iters", "1000000") as (process, log):
        wait_for((save / TRACKER).exists)
        process.send_signal(number)
        assert process.wait(PATIENCE) == status
        wait_for(lambda: not left(log))
    output = log.read_text()
    assert "Traceback" not in output, output[-3000:]
    assert "rank 0: " in output and "exiting program after" in output
    last = find_checkpoint(str(save)).iteration
    assert f"successfully saved checkpoint from iteration {last:7d}" in output
    assert f"iteration {last + 1:8d}/" not in output


def test_ranks_are_started_again_when_one_has_died(data, tmp_path):
    """With --max-restarts they go on from the last checkpoint."""
    save = tmp_path / "checkpoint"
    flags = ["--train-iters", "40", "--save-retain-interval", "40"]
    with launched("megatron_mdm.launch --max-restarts 1", data, tmp_path, *flags) as (process, log):
        wait_for((save / TRACKER).exists)
        psutil.Process(process.pid).children()[-1].kill()
        assert process.wait(PATIENCE) == 0, log.read_text()[-3000:]
    assert re.search(
        r"^rank \d \(process \d+\) was ended by SIGKILL.*; the ranks start again$",
        log.read_text(),
        re.MULTILINE,
    )
    found = re.findall(r"successfully loaded checkpoint .* at iteration (\d+)", log.read_text())
    assert len(found) == 1 and 1 <= int(found[0]) < 40
    assert find_checkpoint(str(save)).iteration == 40
