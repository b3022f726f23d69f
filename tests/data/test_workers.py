"""Worker processes: their order, their errors and how they end."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_mdm.data.workers import Workers
from megatron_mdm.errors import UserError
from tests import ROOT
from tests.data.texts import members, wait_for_the_end_of_group


def sleeper():
    def sleep(task):
        number, seconds = task
        time.sleep(seconds)
        return number

    return sleep


def test_workers_keep_the_order_and_take_few_tasks_in_advance():
    taken = []

    def tasks():
        for number in range(40):
            taken.append(number)
            yield number, 0.5 if number == 3 else 0.0

    with Workers(2, sleeper) as workers:
        for wanted, result in enumerate(workers.map(tasks())):
            assert result == wanted
            assert len(taken) <= wanted + 10
    assert len(taken) == 40


def raiser(error):
    def fail(_task):
        raise error

    return fail


def test_errors_of_workers_arrive():
    with (
        pytest.raises(UserError, match="^one line$"),
        Workers(1, raiser, UserError("one line")) as w,
    ):
        list(w.map([0]))
    with pytest.raises(RuntimeError, match="KeyError: 'x'"), Workers(1, raiser, KeyError("x")) as w:
        list(w.map([0]))
    with pytest.raises(RuntimeError, match="TypeError"), Workers(1, raiser) as w:
        list(w.map([0]))


def dier_within_a_message():
    def die(_connection, buffer):
        os.write(_connection.fileno(), bytes(buffer[:2]))
        os.kill(os.getpid(), signal.SIGKILL)

    def work(_task):
        multiprocessing.connection.Connection._send = die

    return work


def test_death_within_a_message_is_noticed():
    with pytest.raises(UserError, match="signal 9"), Workers(2, dier_within_a_message) as workers:
        list(workers.map([0, 0, 0]))


def test_workers_end_when_the_parent_is_killed():
    code = (
        "import functools, time\n"
        "from megatron_mdm.data.workers import Workers\n"
        "with Workers(2, functools.partial, time.sleep) as workers:\n"
        "    for _ in workers.map([0] * 2 + [1] * 100): print('x', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")])},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    process.stdout.readline()
    assert len(list(members(process.pid))) >= 3
    process.kill()
    process.wait()
    process.stdout.close()
    wait_for_the_end_of_group(process.pid)


def test_workers_import_nothing_large(model):
    code = (
        "import sys, megatron_mdm.data.tokenizer, benchmarks.preprocessing\n"
        "from megatron_mdm.data.load_tokenizer import load_sentencepiece\n"
        "load_sentencepiece(sys.argv[1]).load()('text')\n"
        "import tokenizers\n"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(model)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")])},
        check=True,
    )
