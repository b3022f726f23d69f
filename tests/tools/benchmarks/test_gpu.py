"""benchmark.py gpu, run on the CPU with tiny models."""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.sides import ffn_size
from megatron_mdm.errors import UserError
from tests import ROOT


def parsed(*flags):
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    return parser.parse_args(flags)


# The tool. Processes that measure import this file, and fail to profile two layers.
TOOL = """
import sys
from benchmarks import gpu
from megatron_mdm.errors import run_tool

profiles = gpu._profiles

def fails_for_two_layers(*args):
    from megatron.training import get_args
    if get_args().num_layers == 2:
        raise RuntimeError("no events")
    return profiles(*args)

gpu._profiles = fails_for_two_layers
if __name__ == "__main__":
    sys.path.insert(0, "tools")
    import benchmark
    try:
        run_tool(benchmark.main)
    finally:
        print("torch" in sys.modules, file=sys.stderr)
"""


def test_what_is_missing_is_measured_and_what_is_there_is_kept(tmp_path):
    """This holds where no profile can be made, too. The waiting process does not import torch."""
    path, script = tmp_path / "gpu.json", tmp_path / "tool.py"
    script.write_text(TOOL)
    flags = ["--tiny", "--rounds", "4", "--json", str(path)]
    flags += ["--flags", "--adam-beta2 0.95", "--peak-tflops", "0.001", "1"]

    def run(*more):
        words = [sys.executable, str(script), "gpu", *flags, *more]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
        environment = {**os.environ, "PYTHONPATH": paths}
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)

    first = run("--profile", "--precisions", "bf16")
    assert first.returncode == 0, first.stderr[-3000:]
    assert first.stderr.endswith("\nFalse\n")
    results = json.loads(path.read_text())["measurements"]
    assert set(results) == {"tiny bf16", "small bf16"}
    assert all(len(x["seconds"]) == 4 for x in results["small bf16"]["sides"].values())
    sides = results["tiny bf16"]["sides"]
    assert sides["gpt"]["ratio_to_gpt"]["median"] == 1.0
    useful = {side: values["useful_flops_per_token"] for side, values in sides.items()}
    assert useful["full_head"] == useful["masked_head"] < useful["gpt"] > useful["causal"]
    line = next(x for x in first.stdout.splitlines() if x.startswith("tiny") and " gpt " in x)
    mfu = sides["gpt"]["tokens_per_s"] * useful["gpt"] / 1e9
    assert f"{mfu:.1%}" in line
    assert re.search(r"\n  adam_beta2 \.+ 0.95\n", first.stderr)
    profile = (tmp_path / "gpu.json.profile.txt").read_text()
    assert profile.startswith("tiny bf16\n") and "aten::mm" in profile
    assert all(f"\n{side}, a step takes " in profile for side in sides)
    assert profile.endswith("\nsmall bf16\n\nno profile: RuntimeError: no events\n\n")

    again = run("--profile")  # all that can be measured here is there
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert json.loads(path.read_text())["measurements"] == results
    assert (tmp_path / "gpu.json.profile.txt").read_text() == profile
    for other, name in (("--rounds", "8"), "rounds"), (("--flags", ""), "flags"):
        differs = run(*other)
        assert differs.returncode == 2
        assert f"\nerror: {path} has results with another {name}" in f"\n{differs.stderr}"


@pytest.mark.parametrize(
    ("ends", "why"),
    [(lambda: os._exit(9), "exit status 9"), (lambda: time.sleep(600), "took longer than")],
)
def test_times_are_kept_before_a_profile_that_never_comes(ends, why, tmp_path, monkeypatch):
    kept = []

    def measure(*args):
        (Path(args[-1]) / gpu.RESULT).write_text('{"sides": {}}')
        ends()

    def start(_, *args):
        process = multiprocessing.get_context("fork").Process(target=measure, args=args)
        process.start()
        return process

    monkeypatch.setattr(gpu, "_start", start)
    profile = gpu._in_a_process("tiny", "bf16", {}, "cpu", True, 3.0, kept.append)
    assert kept == [{"sides": {}}]
    assert profile.startswith("no profile: ") and why in profile


def test_a_failure_is_recorded_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    """The call then reports it; the next call tries again."""
    path = str(tmp_path / "gpu.json")
    asked = []

    def in_a_process(name, *others):
        asked.append(name)
        keep = others[-1]
        keep({"failed": "ValueError: no"} if name == "tiny" else {"out_of_memory": True})

    monkeypatch.setattr(gpu, "_in_a_process", in_a_process)
    for _ in range(2):
        with pytest.raises(UserError, match=f"^tiny bf16 failed, see {path}"):
            gpu.run(parsed("--tiny", "--precisions", "bf16", "--json", path))
        out = capsys.readouterr().out
        assert "tiny         bf16 ValueError: no" in out
        assert "small        bf16 out of memory" in out
    gpu.run(parsed("--tiny", "--sizes", "small", "--precisions", "bf16", "--json", path + "2"))
    assert asked == ["tiny", "small", "tiny", "small"]
    assert set(json.loads(Path(path).read_text())["measurements"]) == {
        "tiny bf16",
        "small bf16",
    }


@pytest.mark.ranks
def test_a_process_that_fails_says_why(tmp_path):
    machine = {"device": "a processor", "torch": "2"}
    about = {**gpu.header(machine, parsed("--tiny", "--json", "x")), "flags": "--no-such-flag"}
    kept = []
    gpu._in_a_process("tiny", "bf16", about, "cpu", False, 300.0, kept.append)
    assert kept[0]["failed"].startswith("UserError: ") and "--no-such-flag" in kept[0]["failed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    json_file = ["--json", str(tmp_path / "x.json")]
    with pytest.raises(UserError, match="no CUDA device was found: on a CPU only --tiny"):
        gpu.run(parsed(*json_file))
    with pytest.raises(UserError, match="--precisions: FP8 needs a GPU"):
        gpu.run(parsed(*json_file, "--tiny", "--precisions", "bf16", "blockwise"))
    with pytest.raises(UserError, match="--sizes tiny: without --tiny the sizes are 0.5B, 1B, 7B"):
        gpu.run(parsed(*json_file, "--sizes", "1B", "tiny"))
    with pytest.raises(UserError, match="--rounds 6: must be a multiple of 4"):
        gpu.run(parsed(*json_file, "--tiny", "--rounds", "6"))
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UserError, match="x.json does not hold results of this benchmark"):
        gpu.run(parsed(*json_file, "--tiny", "--precisions", "bf16"))


def test_the_search_for_the_largest_that_fits():
    fits, fails = {"sides": {}}, {"out_of_memory": True}
    precisions = ["bf16", "delayed"]

    def missing(done, memory=None):
        names = [f"{name} {p}" for name in gpu.SIZES for p in precisions]
        return [x for x in names if gpu._is_missing(*x.split(), precisions, done, memory)]

    done = {f"{name} {p}": fits for name in ("0.5B", "1B") for p in precisions}
    # If a larger size fits in all precisions, the search ends.
    done |= {"7B bf16": fits, "7B delayed": fails, "6B bf16": fits}
    rest = [f"{name} {p}" for name in ("5B", "3.5B", "2.7B") for p in precisions]
    assert missing(done) == ["6B delayed", *rest]
    assert missing(done | {"6B delayed": fits}) == []
    # If BF16 has no room, FP8 has none. 80 GB cannot hold the state of the first three sizes.
    assert missing(done | {"7B bf16": fails, "6B bf16": fails}) == rest
    del done["6B bf16"], done["7B bf16"], done["7B delayed"]
    assert missing(done, memory=85_000_000_000) == rest[2:]
    assert missing(done | {"3.5B bf16": {"failed": "?"}, "3.5B delayed": fits}, 85_000_000_000) == [
        "3.5B bf16",
        *rest[4:],
    ]
    # A size given by name is measured even if it is too large, or a larger one fits.
    assert gpu._is_missing("7B", "bf16", None, done, 85_000_000_000)
    assert gpu._is_missing("2.7B", "bf16", None, {"3.5B bf16": fits}, 85_000_000_000)


def test_sizes_are_what_they_are_named_and_fit():
    for name, size in gpu.SIZES.items():
        assert not size["hidden"] % 128 and not ffn_size(size["hidden"], "cuda") % 128
        assert gpu.num_parameters(name) == pytest.approx(1e9 * float(name[:-1]), rel=0.15)
        assert size["rows"] * size["micro_batches"] == 8
        # Kernels index logits with 32 bits.
        assert size["rows"] * gpu.LENGTH * gpu.LLADA_VOCABULARY < 2**31
    # They fit on an H100, with room for the CUDA context and workspaces.
    for name in ("0.5B", "1B", "2.7B"):
        assert gpu.expected_bytes(name) < 0.85 * 80e9
