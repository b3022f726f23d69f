"""benchmark.py gpu and race as they run on a GPU, on the CPU with tiny models."""

import argparse
import json
import re
import subprocess
import sys

import pytest
import torch

from megatron_mdm.benchmarks import gpu
from megatron_mdm.benchmarks.flops import ModelShape
from megatron_mdm.errors import UserError
from tests import ranks

ROOT = ranks.Path(__file__).parents[2]


def parsed(*flags):
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    return parser.parse_args(flags)


def test_what_is_missing_is_measured_and_what_is_there_is_kept(tmp_path):
    path = tmp_path / "gpu.json"
    there = {"sides": {}, "kept": True}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    header = gpu.header(device, parsed("--tiny", "--rounds", "1", "--json", str(path)))
    path.write_text(json.dumps({**header, "measurements": {"small bf16": there}}))
    tool = [sys.executable, "tools/benchmark.py", "gpu", "--tiny", "--precisions", "bf16"]
    tool += ["--json", str(path), "--peak-tflops", "0.001", "1"]

    def run(*flags):
        return subprocess.run([*tool, *flags], cwd=ROOT, capture_output=True, text=True)

    first = run("--rounds", "1")
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
    other = run("--rounds", "2")
    assert other.returncode == 2
    assert other.stderr.splitlines()[-1].startswith(
        f"error: {path} has results with another rounds"
    )


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


def test_the_largest_that_fits_ends_the_search():
    fits, fails = {"sides": {}}, {"out_of_memory": True}
    done = {"7B bf16": fits, "7B delayed": fails, "6B bf16": fits, "6B delayed": fits}
    precisions = ["bf16", "delayed"]
    skipped = [name for name in gpu.SIZES if gpu._larger_fits(name, precisions, done)]
    assert skipped == ["5B", "3.5B"]
    assert not gpu._larger_fits("6B", precisions, {"7B bf16": fits})


def test_sizes_are_what_they_are_named():
    for name, size in gpu.SIZES.items():
        flags = gpu.model_flags({**size, "length": gpu.LENGTH}, gpu.LLADA_VOCABULARY, "cuda")
        value = {
            n: int(flags[flags.index(f"--{n}") + 1]) for n in ("ffn-hidden-size", "hidden-size")
        }
        assert not any(v % 16 for v in value.values())
        shape = ModelShape(
            num_layers=size["layers"],
            hidden_size=size["hidden"],
            ffn_hidden_size=value["ffn-hidden-size"],
            num_attention_heads=size["heads"],
            vocab_size=gpu.LLADA_VOCABULARY,
            seq_length=gpu.LENGTH,
        )
        assert shape.num_parameters == pytest.approx(1e9 * float(name[:-1]), rel=0.15)


def test_a_race_of_another_model(tmp_path):
    """Its flags win over the race's own, on either device."""
    model = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --ffn-hidden-size 16"
    tool = [sys.executable, "tools/benchmark.py", "race", "--directory", str(tmp_path)]
    tool += "--device cpu --length 8 --batch 16 --steps 20 --seeds 1 --competitors standard".split()
    run = subprocess.run([*tool, "--flags", model], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    (log,) = tmp_path.glob("*.log")
    (kept,) = tmp_path.glob("*.json")
    flags = json.loads(kept.read_text())["flags"]
    assert flags.index("--hidden-size") < len(flags) - 1 - flags[::-1].index("--hidden-size")
    assert re.search(r"\n  hidden_size \.+ 16\n", log.read_text())
