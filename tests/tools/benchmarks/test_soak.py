"""The soak, small, and each of its checks on something that it has to find."""

import json
import multiprocessing
import subprocess
import sys

import psutil
import pytest
from torch.utils.tensorboard import SummaryWriter

from benchmarks.python_text import write_data
from benchmarks.soak import checks, job
from benchmarks.soak.plan import BACKGROUND, KINDS, Strike, flags_of, make_plan, saving
from megatron_mdm.mcore.checkpoint.files import find_checkpoint
from tests import ROOT, ranks


def test_the_plan_has_a_strike_in_each_part():
    plan = make_plan(20_000, ["DP2", "TP2", "one"], 6, seed=1)
    assert plan == make_plan(20_000, ["DP2", "TP2", "one"], 6, seed=1)
    assert plan != make_plan(20_000, ["DP2", "TP2", "one"], 6, seed=2)
    assert [leg.end for leg in plan.legs] == [5000, 7500, 10_000] and plan.iterations == 10_000
    parts = [strike.iteration * 6 // plan.iterations for strike in plan.strikes]
    assert parts == [0, 1, 2, 3, 4, 5]
    assert {strike.kind for strike in plan.strikes} == set(KINDS)


def test_scalars_that_a_resume_repeats_must_be_equal(tmp_path):
    for start, values in enumerate([{1: 0.5, 2: 0.25, 3: 0.1}, {3: 0.1, 4: 0.2}, {4: 0.3}]):
        with SummaryWriter(str(tmp_path), filename_suffix=f".{start}") as writer:
            for iteration, value in values.items():
                writer.add_scalar("mdm loss", value, iteration)
                writer.add_scalar("iteration-time", start, iteration)
    found, wrong = checks.scalars_of(tmp_path)
    assert list(found) == ["mdm loss"] and list(found["mdm loss"]) == [1, 2, 3, 4]
    assert len(wrong) == 1 and wrong[0].startswith("mdm loss, iteration 4: 0.2")
    assert checks.missing(found, 4) == [] and checks.missing(found, 6) == [5, 6]


def test_runs_that_differ_by_a_bit():
    whole = {"mdm loss": {1: 0.5, 2: 0.25, 3: 0.1}}
    assert checks.unequal(whole, whole, 3) == []
    assert checks.unequal({"mdm loss": {1: 0.5, 2: 0.25}}, whole, 2) == []
    assert len(checks.unequal({"mdm loss": {1: 0.5, 2: 0.25 + 2**-30}}, whole, 3)) == 2
    old = {"mdm loss": dict.fromkeys(range(1, 100), 2.0)}
    new = {"mdm loss": old["mdm loss"] | {31: 2.0002, 30: 3.0, 51: 3.0}}
    assert checks.difference(new, old, 30) == pytest.approx(1e-4)
    with pytest.raises(KeyError):
        checks.difference(new, old, 90)


def test_memory_that_grows_is_found():
    def samples(slope):
        return [
            {"iteration": i, "rank 0": 2**28 + 2**20 * (i < 400) + int(slope * i * 1.024)}
            for i in range(0, 1000, 10)
        ]

    ending = [{"iteration": 990, "rank 0": 2**30}] * 2  # its workers have ended
    assert checks.slopes(samples(0.0) + ending) == checks.slopes(samples(0.0))
    assert checks.slopes(samples(0.0))["rank 0"]["slope"] == pytest.approx(0, abs=1e-6)
    assert checks.slopes(samples(100.0))["rank 0"]["slope"] == pytest.approx(100, rel=1e-2)
    assert checks.slopes(samples(100.0)[:30]) == {} and checks.slopes([]) == {}


def test_what_should_not_stay_beside_checkpoints(tmp_path):
    for name in ("iter_0000100", "iter_0000120", "iter_0000130", "iter_0000200"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("130")
    (tmp_path / "latest_checkpointed_iteration.txt.tmp-1").touch()
    left = ["iter_0000120", "iter_0000200", "latest_checkpointed_iteration.txt.tmp-1"]
    assert checks.stray(tmp_path, 100) == left


def test_shared_memory_of_a_process():
    before = job.segments_of([psutil.Process()])
    semaphore = multiprocessing.get_context("spawn").Semaphore()  # has a name until it is freed
    segments = job.segments_of([psutil.Process()]) - before
    assert len(job.names_of(segments)) == 1 and "/dev/shm/sem.mp-" in job.names_of(segments)[0]
    del semaphore
    assert job.names_of(segments) == []


@pytest.fixture(scope="module")
def soaked(tmp_path_factory):
    """A soak of 400 steps: one rank is killed once, and then there are two."""
    directory = tmp_path_factory.mktemp("soak")
    words = "soak --steps 400 --strikes 1 --layouts one DP2 --foreground --seed 1".split()
    where = ["--directory", str(directory / "runs"), "--json", str(directory / "soak.json")]
    run = subprocess.run(
        [sys.executable, "tools/benchmark.py", *words, *where],
        cwd=ROOT, env=ranks.users_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return json.loads((directory / "soak.json").read_text()), run.stdout


def test_a_small_soak_finds_nothing(soaked):
    results, table = soaked
    assert results["failures"] == [] and table.splitlines()[-1] == "nothing failed"
    struck = [start for start in results["starts"] if start["run"] == "struck"]
    assert [start["layout"] for start in struck] == ["one", "one", "DP2"]
    assert [start["strike"] for start in struck] == ["rank", None, None]
    assert results["equal"]["mdm loss"] == results["equal"]["grad-norm"] == 100
    assert results["equal"]["mdm/validation NELBO"] >= 2
    # The bell fades, and then P-POTS fits, before the layout changes.
    assert results["equal"]["mdm/uniform share"] == 20 and results["equal"]["mdm/density KL"] == 2
    change = results["changes"][0]
    assert (change["after"], change["from"], change["to"]) == (100, "one", "DP2")
    assert 0 < change["difference"] <= checks.CLOSE


@pytest.mark.ranks
def test_nothing_outlives_a_killed_launcher(tmp_path):
    """With a process that writes checkpoints, and others that load rows. The rank still saves."""
    plan = make_plan(400, ["one"], 0, seed=1)
    write_data(tmp_path)
    flags = [*flags_of(plan, tmp_path, 1), *saving(plan, tmp_path), *BACKGROUND.split()]
    (tmp_path / "tmp").mkdir()
    strike = Strike("launcher", 1, 0.0, 0)
    start = job.run_job(1, flags, tmp_path / "log", tmp_path / "tmp", strike)
    assert start.strike is strike and start.status == -9
    assert start.left == [] and start.segments == []
    assert "torchrun is gone: the run ends after this iteration" in (tmp_path / "log").read_text()
    assert find_checkpoint(str(tmp_path / "checkpoint")).iteration < plan.iterations
