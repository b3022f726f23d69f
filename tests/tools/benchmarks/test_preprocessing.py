"""tools/benchmark.py data: both sides write the same output."""

import json
import runpy
import sys

import pytest

from tests import ROOT


def test_benchmark(tmp_path, monkeypatch, capsys):
    tool = ROOT / "tools/benchmark.py"

    def benchmark(*arguments):
        monkeypatch.setattr(sys, "argv", [str(tool), "data", *map(str, arguments)])
        runpy.run_path(str(tool), run_name="__main__")

    benchmark("--mb", 1, "--workers", 2, "--json", tmp_path / "data.json")
    results = json.loads((tmp_path / "data.json").read_text())
    assert results["identical_output"] is True
    assert results["text_bytes"] >= 1_000_000
    assert {len(side["seconds"]) for side in results["sides"].values()} == {3}
    assert f"ratio {results['ratio']:.2f} on " in capsys.readouterr().out
    with pytest.raises(SystemExit) as status:
        benchmark("--mb", "0.5")
    assert status.value.code == 2
