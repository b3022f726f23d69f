"""benchmark.py gpu and race as they run on a GPU, on the CPU with tiny models."""

import argparse
import json
import re
import subprocess
import sys

import pytest
import torch

from megatron_mdm.benchmarks import gpu
from megatron_mdm.benchmarks.overhead import ffn_size
from megatron_mdm.errors import UserError
from tests import ranks

ROOT = ranks.Path(__file__).parents[2]


def parsed(*flags):
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    return parser.parse_args(flags)


def test_what_is_missing_is_measured_and_what_is_there_is_kept(tmp_path):
    path = tmp_path / "gpu.json"
    flags = ["--tiny", "--rounds", "1", "--json", str(path)]
    flags += ["--flags", "--adam-beta2 0.95", "--precisions", "bf16"]
    there = {"sides": {}, "kept": True}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    header = gpu.header(device, parsed(*flags))
    path.write_text(json.dumps({**header, "measurements": {"small bf16": there}}))
    tool = [sys.executable, "tools/benchmark.py", "gpu", *flags, "--peak-tflops", "0.001", "1"]

    def run(*flags):
        return subprocess.run([*tool, *flags], cwd=ROOT, capture_output=True, text=True)

    first = run("--profile")
    assert first.returncode == 0, first.stderr[-3000:]
    results = json.loads(path.read_text())["measurements"]
    assert set(results) == {"tiny bf16", "small bf16"}
    assert results["small bf16"] == there
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
    for other, name in (("--rounds", "2"), "rounds"), (("--flags", ""), "flags"):
        differs = run(*other)
        assert differs.returncode == 2
        assert differs.stderr.splitlines()[-1].startswith(
            f"error: {path} has results with another {name}"
        )


def test_a_failure_is_recorded_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    """Then the call says so; the next one tries again."""
    path = str(tmp_path / "gpu.json")
    asked = []

    def in_a_process(name, *_):
        asked.append(name)
        return {"failed": "ValueError: no"} if name == "tiny" else {"out_of_memory": True}

    monkeypatch.setattr(gpu, "_in_a_process", in_a_process)
    for _ in range(2):
        with pytest.raises(UserError, match=f"^tiny bf16 failed, {path} says why"):
            gpu.run(parsed("--tiny", "--precisions", "bf16", "--json", path))
        out = capsys.readouterr().out
        assert "tiny         bf16 ValueError: no" in out
        assert "small        bf16 out of memory" in out
    assert asked == ["tiny", "small", "tiny"]
    assert set(json.loads(ranks.Path(path).read_text())["measurements"]) == {
        "tiny bf16",
        "small bf16",
    }


def test_a_process_that_fails_says_why(tmp_path):
    about = {**gpu.header("cpu", parsed("--tiny", "--json", "x")), "flags": "--no-such-flag"}
    found = gpu._in_a_process("tiny", "bf16", about, "cpu", False, 300.0)
    assert found["failed"].startswith("UserError: ") and "--no-such-flag" in found["failed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    json_file = ["--json", str(tmp_path / "x.json")]
    with pytest.raises(UserError, match="no CUDA device was found: --tiny"):
        gpu.run(parsed(*json_file))
    with pytest.raises(UserError, match="--precisions: FP8 needs a GPU"):
        gpu.run(parsed(*json_file, "--tiny"))
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
    # A larger one ends the search if it fits in all precisions.
    done |= {"7B bf16": fits, "7B delayed": fails, "6B bf16": fits}
    rest = [f"{name} {p}" for name in ("5B", "3.5B", "2.7B") for p in precisions]
    assert missing(done) == ["6B delayed", *rest]
    assert missing(done | {"6B delayed": fits}) == []
    # Without room in BF16, FP8 has none; 80 GB have none for the state of the first three.
    assert missing(done | {"7B bf16": fails, "6B bf16": fails}) == rest
    del done["6B bf16"], done["7B bf16"], done["7B delayed"]
    assert missing(done, memory=85_000_000_000) == rest[2:]
    assert missing(done | {"3.5B bf16": {"failed": "?"}, "3.5B delayed": fits}, 85_000_000_000) == [
        "3.5B bf16",
        *rest[4:],
    ]


def test_sizes_are_what_they_are_named():
    for name, size in gpu.SIZES.items():
        assert not size["hidden"] % 16 and not ffn_size(size["hidden"]) % 16
        assert gpu.num_parameters(name) == pytest.approx(1e9 * float(name[:-1]), rel=0.15)


def test_a_race_of_another_model(tmp_path):
    """Its flags win over the race's own, on either device."""
    model = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --ffn-hidden-size 16"
    tool = [sys.executable, "tools/benchmark.py", "race", "--directory", str(tmp_path)]
    tool += "--device cpu --length 8 --batch 16 --steps 20 --seeds 1 --competitors standard".split()
    run = subprocess.run([*tool, "--flags", model], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    (log,) = tmp_path.glob("*.log")
    flags = json.loads(log.with_suffix(".json").read_text())["flags"]
    assert flags.index("--hidden-size") < len(flags) - 1 - flags[::-1].index("--hidden-size")
    assert re.search(r"\n  hidden_size \.+ 16\n", log.read_text())
