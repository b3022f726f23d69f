"""benchmark.py gpu, on the CPU with tiny models: that it runs, keeps, and goes on."""

import argparse
import json
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


def test_tiny_models_are_measured_kept_and_not_measured_again(tmp_path):
    path = tmp_path / "gpu.json"
    tool = [sys.executable, "tools/benchmark.py", "gpu", "--tiny", "--precisions", "bf16"]
    tool += ["--rounds", "1", "--json", str(path), "--peak-tflops", "0.001", "1"]

    def run(*flags):
        return subprocess.run([*tool, *flags], cwd=ROOT, capture_output=True, text=True)

    first = run("--minutes", "0.9")  # enough for one, and none more after it or all
    assert first.returncode == 0, first.stderr[-3000:]
    kept = json.loads(path.read_text())["measurements"]
    assert "tiny bf16" in kept
    second = run()
    assert second.returncode == 0, second.stderr[-3000:]
    results = json.loads(path.read_text())["measurements"]
    assert list(results) == ["tiny bf16", "small bf16"]
    assert results["tiny bf16"] == kept["tiny bf16"]
    for measurement in results.values():
        sides = measurement["sides"]
        assert sides["gpt"]["ratio_to_gpt"]["median"] == 1.0
        useful = {side: values["useful_flops_per_token"] for side, values in sides.items()}
        assert useful["full_head"] == useful["masked_head"] < useful["gpt"] > useful["causal"]
    line = next(x for x in second.stdout.splitlines() if x.startswith("small") and " gpt " in x)
    values = results["small bf16"]["sides"]["gpt"]
    mfu = values["tokens_per_s"] * values["useful_flops_per_token"] / 1e9
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
