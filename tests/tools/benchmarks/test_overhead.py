import argparse
import json

import pytest

from benchmarks import baseline, overhead
from megatron_mdm.errors import UserError
from tests import ranks


def test_steps_of_both_objectives_in_turns(tmp_path):
    json_file = tmp_path / "overhead.json"
    sizes = "--layers 2 --hidden 32 --heads 2 --rows 4 --length 64 --vocabulary 40000 --rounds 4"
    tool = ["--", "tools/benchmark.py", "overhead", "--json", str(json_file), *sizes.split()]
    ranks.launch(tmp_path, 1, *tool, entry="tool")
    results = json.loads(json_file.read_text())
    assert set(results["sides"]) == {"gpt", "full_head", "masked_head", "causal"}
    # Times of so few steps of so small a model decide nothing: only that there are some.
    assert results["tokens_per_s_ratio_masked_head"] > 0
    assert results["tokens_per_s_ratio_full_head"] > 0
    ratios = results["tokens_per_s_ratios"]["masked_head"]
    assert ratios["quartiles"][0] <= ratios["median"] <= ratios["quartiles"][1]
    if results["peak_memory_ratio_masked_head"] is not None:
        assert results["peak_memory_ratio_masked_head"] < 0.9
        # Logits, which the cross entropy overwrites: 4 bytes for each of 4 x 64 positions.
        assert results["sides"]["full_head"]["peak_bytes"] >= 4 * 64 * 40_000 * 4
    # The table is all that goes to stdout.
    table = (tmp_path / "stdout0").read_text().splitlines()
    assert len(table) == 6 and "masked head" in table[4]


def test_sides_compute_what_they_are_named_for(tmp_path):
    ranks.launch(tmp_path, 1, entry="benchmark_sides")
    assert (tmp_path / "sides").read_text() == "seen"


@pytest.mark.parametrize("benchmark", [overhead, baseline])
def test_sizes_that_cannot_work_are_refused(benchmark, monkeypatch):
    monkeypatch.setattr(overhead, "use_device", lambda: "cpu")  # it would change this process
    for flags, message in (
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--rows", "0"], "--rows 0: must be at least 1"),
        (["--vocabulary", "10"], "--vocabulary 10: must be above 256, bytes and mask"),
        (["--hidden", "128", "--heads", "3"], "--hidden 128: must be a multiple of 2 x --heads 3"),
        (["--hidden", "30", "--heads", "2"], "--hidden 30: must be a multiple of 2 x --heads 2"),
    ):
        parser = argparse.ArgumentParser()
        benchmark.add_arguments(parser)
        with pytest.raises(UserError, match=message):
            benchmark.run(parser.parse_args(flags))
