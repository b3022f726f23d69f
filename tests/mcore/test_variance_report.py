"""tools/variance_report.py on a checkpoint."""

import itertools
import json
import subprocess
import sys

import pytest

from tests import ranks

ROOT = ranks.Path(__file__).parents[2]


def report(base, data, output, *flags):
    command = [sys.executable, "tools/variance_report.py", "--device", "cpu", "--data", str(data)]
    command += ["--load", base[base.index("--load") + 1], "--output", str(output)]
    command += ["--rows", "40", "--batches", "0", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_checkpoint_gives_a_report(base, data, tmp_path):
    runs = {
        "whole": [],
        "sketch": ["--sketch", "2000", "--micro-batch", "3"],
        "group": ["--parameters", "output_layer", "--batches", "2", "--batch", "4"],
    }
    results = {}
    for name, flags in runs.items():
        run = report(base, data, tmp_path / f"{name}.json", *flags)
        assert run.returncode == 0, run.stderr[-2000:]
        assert "A     mask pattern" in run.stdout
        assert "C     autoregressive" in run.stdout
        results[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] * 3 + [".png"] * 3
    for part, value in results["whole"]["loss"].items():
        assert value == pytest.approx(results["sketch"]["loss"][part], rel=1e-4), part
    whole, sketch, group = (results[name]["gradient"] for name in runs)
    assert sketch["total"][0] == pytest.approx(whole["total"][0], rel=0.1)
    assert 0 < group["A"][0] < whole["A"][0]
    assert len(results["group"]["methods"]) == 11


def test_ranks_give_the_same_report(base, data, tmp_path):
    """Tensor-parallel ranks share the parameters; the layer norms are on both of them."""
    flags = ["--rows", "8", "--batches", "0"]
    groups = {"all": [], "norms": ["--parameters", "norm"], "sketch": ["--sketch", "4000"]}
    reports = {}
    for ranks_, (name, more) in itertools.product((1, 2), groups.items()):
        output = tmp_path / f"{name}{ranks_}.json"
        tool = ["--", "tools/variance_report.py", "--device", "cpu", "--data", str(data)]
        tool += ["--load", base[base.index("--load") + 1], "--output", str(output)]
        ranks.launch(tmp_path / f"{name}{ranks_}", ranks_, *tool, *flags, *more, entry="tool")
        reports[name, ranks_] = json.loads(output.read_text())
    for name in groups:
        one, two = reports[name, 1], reports[name, 2]
        # Two ranks project on other numbers than one: the same in the mean.
        near, parts = (0.2, ["total"]) if name == "sketch" else (1e-3, ["A", "B", "C"])
        scale = one["gradient"]["total"][0]
        for part in parts:
            a, b = (report["gradient"][part][0] / scale for report in (one, two))
            assert a == pytest.approx(b, abs=near), part
        a, b = (report["autoregressive"]["gradient"]["C"][0] for report in (one, two))
        assert a == pytest.approx(b, rel=near)
        assert one["loss"]["A"] == pytest.approx(two["loss"]["A"], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rates", "2"], "--rates 3"),
        (["--figure", "x.pdf"], "must end in .png or .svg"),
        (["--parameters", "nowhere"], "--parameters nowhere: no parameter has that"),
    ],
)
def test_bad_input_is_one_line(base, data, tmp_path, flags, message):
    run = report(base, data, tmp_path / "x.json", *flags)
    assert run.returncode == 2
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not list(tmp_path.iterdir())
