"""Two machines run examples/pretrain/launch.sh, one is lost, and both start again.

A machine is a shell in its own namespaces (network, host name, processes). It ends with its first
process, and at the latest with pytest. The test takes a minute and a half. No other test has two
host names, a network between them, and a rank that falls silent.
"""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_mdm.mcore.checkpoint.files import find_checkpoint
from tests import ROOT, ranks
from tests.examples.test_pretrain_examples import FILES, TINY

PATIENCE = 120.0  # seconds; waits take up to 30 on two cores
SILENCE = 8  # seconds that a rank waits for another rank
ITERATIONS, INTERVAL = 20, 4
ADDRESSES = {"node0": "10.255.255.1", "node1": "10.255.255.2"}
MACHINE = (
    "setpriv --pdeathsig KILL unshare --net --uts --mount-proc --pid --fork --kill-child".split()
)
# Arguments: name, hosts file, address, command. It prints a line when its network can be connected.
BOOT = """set -e
hostname "$1"
mount --bind "$2" /etc/hosts
ip link set lo up
echo ready
exec >&2
read -r _
ip address add "$3/30" dev eth0
ip link set eth0 up
shift 3
"$@"
"""


def environment_of(gpus):
    """The environment of launch.sh on a machine with this number of ranks."""
    own = {"GPUS": str(gpus), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    own["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**ranks.users_environment(), **own}


@contextlib.contextmanager
def two_machines(directory, *command):
    """Runs the command on both machines and yields their processes.

    Their output goes to node0.log and node1.log. Both are ended at the exit.
    """
    directory.mkdir()
    hosts = directory / "hosts"
    names = [f"{address} {name}\n" for name, address in ADDRESSES.items()]
    hosts.write_text("".join(["127.0.0.1 localhost\n", *names]))
    environment = {**environment_of(1), "NODES": "2", "MASTER": "node0", "PORT": "29511"}
    with contextlib.ExitStack() as stack:
        machines = []
        for name, address in ADDRESSES.items():
            machine = stack.enter_context(
                subprocess.Popen(
                    [*MACHINE, "sh", "-c", BOOT, "boot", name, str(hosts), address, *command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stack.enter_context(open(directory / f"{name}.log", "w")),
                    env=environment,
                    text=True,
                )
            )
            stack.callback(machine.kill)
            machines.append(machine)
            if machine.stdout.readline() != "ready\n":
                pytest.skip(f"no namespaces here: {(directory / f'{name}.log').read_text()}")
        one, other = (["eth0", "netns", str(machine.pid)] for machine in machines)
        link = ["ip", "link", "add", *one, "type", "veth", "peer", "name", *other]
        connected = subprocess.run(link, capture_output=True, text=True)
        if connected.returncode:
            pytest.skip(f"no network between namespaces here: {connected.stderr}")
        for machine in machines:
            machine.stdin.write("go\n")
            machine.stdin.flush()
        yield machines


def lose(machine):
    """Disconnects the machine first, so that no connection is closed, and then kills it."""
    off = ["nsenter", "-t", str(machine.pid), "--net", "ip", "link", "set", "eth0", "down"]
    subprocess.run(off, check=True)
    machine.kill()
    machine.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces are root's to make")
@pytest.mark.timeout(600)
def test_a_lost_machine_ends_the_run_of_the_other_and_both_resume(tmp_path, data):
    save = tmp_path / "checkpoint"
    model = ["170m", str(data), "my.model"]
    flags = [*TINY, *ranks.TOKENIZER, "--data-cache-path", str(tmp_path / "cache")]
    flags += f"--train-iters {ITERATIONS} --save-interval {INTERVAL}".split()
    flags += ["--distributed-timeout-seconds-after-init", str(SILENCE)]

    def command(save, board):
        """The launch line of a run that saves to `save`."""
        own = ["--save", str(save), "--load", str(save), "--tensorboard-dir", str(tmp_path / board)]
        return ["bash", str(FILES / "launch.sh"), *model, *flags, *own]

    with two_machines(tmp_path / "first", *command(save, "tb1")) as machines:
        tracker, end = save / "latest_checkpointed_iteration.txt", time.monotonic() + PATIENCE
        while not tracker.exists():
            assert time.monotonic() < end and all(m.poll() is None for m in machines), log_of(
                tmp_path / "first"
            )
            time.sleep(0.02)
        lose(machines[1])
        status = machines[0].wait(PATIENCE)
        log = (tmp_path / "first" / "node0.log").read_text()
    assert status == 1
    said = [line for line in log.splitlines() if line.startswith("rank 0: iteration ")]
    assert len(said) == 1 and "another rank is gone or does not answer" in said[0]
    assert "[rank0]: Traceback" not in log and "[rank1]: Traceback" not in log

    saved = find_checkpoint(str(save)).iteration
    assert INTERVAL <= saved < ITERATIONS
    with two_machines(tmp_path / "second", *command(save, "tb2")) as machines:
        statuses = [machine.wait(PATIENCE) for machine in machines]
    assert statuses == [0, 0], log_of(tmp_path / "second")

    other = tmp_path / "never lost"
    one = {"env": environment_of(2), "capture_output": True, "text": True}
    whole = subprocess.run(command(other, "tb"), **one)  # two ranks on one machine
    assert whole.returncode == 0, whole.stderr[-8000:]
    reference, resumed = (ranks.read_scalars(tmp_path / board) for board in ("tb", "tb2"))
    for name in ("mdm loss", "grad-norm"):
        assert len(resumed[name]) == ITERATIONS - saved
        assert resumed[name] == reference[name][saved:], name
    ours, theirs = ranks.weights(save), ranks.weights(other)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(value) for name, value in theirs.items())


def log_of(directory):
    """The last lines of both logs."""
    return "\n".join(path.read_text()[-8000:] for path in sorted(directory.glob("*.log")))
