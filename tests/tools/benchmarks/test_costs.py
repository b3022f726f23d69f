import argparse
import json

import pytest

from benchmarks import costs
from megatron_mdm.errors import UserError
from tests import ranks


def test_a_stopwatch_counts_nothing_twice():
    now = [0.0]
    watch = costs.Stopwatch(clock=lambda: now[0])

    def spend(seconds, *inner):
        now[0] += seconds
        for function in inner:
            function()

    leaf = watch.timed("leaf", lambda: spend(1.0))
    middle = watch.timed("middle", lambda: spend(10.0, leaf, leaf))
    watch.timed("whole", lambda: spend(100.0, middle, leaf))()
    assert watch.seconds == {"leaf": 3.0, "middle": 10.0, "whole": 100.0}

    def fail():
        now[0] += 1.0
        raise ValueError("spent")

    with pytest.raises(ValueError, match="^spent$"):
        watch.timed("whole", watch.timed("leaf", fail))()
    assert watch.seconds == {"leaf": 4.0, "middle": 10.0, "whole": 100.0}


def test_functions_are_back_in_their_places():
    owner = argparse.Namespace(f=abs)
    replacement = (owner, "f", lambda f: lambda x: f(x) + 1)
    with pytest.raises(ValueError, match="^over$"), costs.wrapped([replacement]):
        assert owner.f(-1) == 2
        raise ValueError("over")
    assert owner.f is abs


def test_every_part_is_seen_and_the_state_is_small(tmp_path):
    ranks.launch(tmp_path, 1, entry="benchmark_costs")
    results = json.loads((tmp_path / "costs.json").read_text())
    seconds = results["part_seconds_per_step"]
    assert set(seconds) == set(costs.PARTS)
    assert all(value > 0 for value in seconds.values())
    assert results["share"] == pytest.approx(sum(seconds.values()) / results["step_seconds"])
    assert 0 < results["share"] < 1
    state = results["checkpoint"]
    assert 0 < state["state_bytes"] <= state["bytes_added"] < 2**20
    output = (tmp_path / "rank0.log").read_text()
    assert output.count("P-POTS refit") == 2 and output.count(" mdm iteration ") == 5


def test_numbers_that_cannot_work_are_refused():
    for flags, message in (
        (["--steps", "50"], "--steps 50: must be a multiple of 100"),
        (["--checkpoints", "0"], "--checkpoints 0: must be at least 1"),
    ):
        parser = argparse.ArgumentParser()
        costs.add_arguments(parser)
        with pytest.raises(UserError, match=message):
            costs.run(parser.parse_args(flags))
