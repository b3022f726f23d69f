"""Scripts of examples/gpu/kit: the pairs that are measured, and the report on a stage.

That all stages run is shown by hand, with DRY=1: see examples/gpu/README.md.
"""

import importlib.util
import json
import subprocess
import sys

import pytest

from benchmarks import gpu
from tests import ROOT

KIT = ROOT / "examples/gpu/kit"


def script(name):
    spec = importlib.util.spec_from_file_location(f"kit_{name}", KIT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pairs_are_measured_once_and_in_their_order(tmp_path, monkeypatch):
    bench, path, asked = script("bench"), tmp_path / "gpu.json", []

    def run(args):
        (size,), (precision,) = args.sizes, args.precisions
        asked.append((size, precision, args.profile, args.tiny))
        found = {"failed": "no"} if size == "0.5B" else {"sides": {}}
        done = {**bench.kept(str(path)), f"{size} {precision}": found}
        path.write_text(json.dumps({"measurements": done}))
        if size == "0.5B":
            raise ValueError

    monkeypatch.setattr(gpu, "run", run)

    def call(*pairs, minutes="9"):
        words = ["--json", str(path), "--minutes", minutes, "--profile-of", "6B:bf16", "--"]
        monkeypatch.setattr(sys, "argv", ["bench.py", *words, *pairs])
        with pytest.raises(SystemExit) as ended:
            bench.main()
        return ended.value.code

    # 3.5B is skipped, because 6B has results in the same precision. A failure does not end the
    # call.
    assert call("6B:bf16", "3.5B:bf16", "0.5B:bf16", "3.5B:tensorwise", "tiny:bf16") == 1
    assert asked == [
        ("6B", "bf16", True, False),
        ("0.5B", "bf16", False, False),
        ("3.5B", "tensorwise", False, False),
        ("tiny", "bf16", False, True),
    ]
    assert call("0.5B:bf16", "6B:bf16") == 0 and len(asked) == 4
    assert call("1B:bf16", minutes="0.5") == 3 and len(asked) == 4
    assert bench.is_wanted("1B", "bf16", {"1B bf16": {"failed": "it took longer than --minutes"}})


def test_the_figures_of_a_stage(tmp_path):
    log = tmp_path / "log"

    def said(stage, text):
        log.write_text(text)
        words = [sys.executable, str(KIT / "figures.py"), stage, str(log), str(tmp_path)]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()

    earlier = "===== te, at most 9 s: x\nCHECK FAIL te-adam 1.0s Error\n"
    text = f"{earlier}===== te, at most 9 s: x\nCHECK ok   te-adam 1.0s 1e-7\n"
    assert said("te", text) == ["    ok   te-adam 1.0s 1e-7"]
    tests = "[gw0] PASSED tests/a.py::one \n[gw1] FAILED tests/a.py::two[x y] \n"
    tests += "FAILED tests/a.py::two[x y] - AssertionError\n==== 1 failed, 1 passed in 2.00s ====\n"
    assert said("tests", tests) == [
        "    1 passed, 1 failed, 0 error, 0 skipped",
        "    1 failed, 1 passed in 2.00s",
        "    FAILED tests/a.py::two[x y] - AssertionError",
    ]
    side = {"tokens_per_s": 5.0, "peak_bytes": None}
    results = {"sides": {"gpt": side, "causal": side}}
    results["tokens_per_s_ratios"] = {"causal": {"median": 0.5}}
    (tmp_path / "throughput.json").write_text(json.dumps(results))
    assert said("throughput", "")[1] == "    causal: 5 tokens/s, ratio 0.500, step 0.00 GB"
    (tmp_path / "logs").mkdir()
    losses = "".join(f" mdm loss: {loss:.3E} |\n" for loss in (5, 4, 3, 2, 1))
    (tmp_path / "logs/train-bf16.log").write_text(losses + "validation NELBO: 1.5 +- 0.1\n")
    first, second = said("train", "TRAINS ordinary\n")
    assert first == "    TRAINS ordinary"
    assert "5 losses 5.000 4.000 3.000 3.000 2.000 1.000; tokens/s -, NELBO 1.5" in second


def test_the_shell_reads_the_script():
    subprocess.run(["bash", "-n", str(KIT / "device.sh")], check=True)


def test_tables_of_the_benchmark_are_found(tmp_path):
    """The figures come from tables as `benchmark.py gpu` prints them."""
    side = {"tokens_per_s": 1.0, "useful_flops_per_token": 1.0, "peak_bytes": None}
    side["ratio_to_gpt"] = {"median": 1.0}
    results = {"device": "a card", "length": 64, "vocabulary": 9}
    results["measurements"] = {"1B bf16": {"sides": {"gpt": side}, "resting_bytes": None}}
    table = gpu._table(results, (1.0, 1.0))
    lines = script("figures").of_bench(f"{table}\n1B:bf16: 5 s\n", tmp_path)
    assert [line.split()[0] for line in lines] == ["1B", "1B:bf16:"]
