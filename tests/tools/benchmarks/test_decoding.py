import json

from tests import ranks
from tests.ranks import entries


def test_sides_write_the_same_number_of_tokens_in_as_many_calls(base, tmp_path):
    json_file = tmp_path / "decoding.json"
    load = ["--load", base[base.index("--load") + 1], "--device", "cpu", "--json", str(json_file)]
    sizes = "--prompt-length 8 --length 24 --batch-size 2 --tokens-per-call 2 --repeats 2".split()
    tool = ["--", "tools/benchmark.py", "decoding", *load, *sizes, "--block-sizes", "4", "8"]
    ranks.launch(tmp_path, 1, *tool, entry=entries.tool)
    results = json.loads(json_file.read_text())
    calls = {name: side["calls"] for name, side in results["sides"].items()}
    assert set(calls.values()) == {12} and list(calls) == [
        "whole rows",
        *("block 4, no cache", "block 4, cache", "block 8, no cache", "block 8, cache"),
    ]
    # Times of so small a model say nothing; the test checks that they exist.
    assert len(results["ratios"]) == 4
    for ratio in results["ratios"].values():
        assert 0 < ratio["quartiles"][0] <= ratio["median"] <= ratio["quartiles"][1]
    table = (tmp_path / "stdout0").read_text().splitlines()
    assert len(table) == 1 + 5 + 4
