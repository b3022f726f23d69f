"""The recipes of examples/pretrain: the launch lines, their flags at full size, and tiny models."""

import json
import os
import re
import shlex
import subprocess

import pytest

from megatron_mdm.sizing.flops import ModelShape
from tests import ROOT, ranks
from tests.examples.recipe import recipe
from tests.ranks import entries

FILES = ROOT / "examples/pretrain"
LAUNCHER = "python -m megatron_mdm.launch"
# What the recipes are named for: parameters, vocabulary of their tokenizers, rotary base.
MODELS = {
    "170m": (170e6 + 2 * 768 * 32_000, 32_000, 10_000),
    "1b": (1.49e9, 126_464, 10_000),
    "8b": (8.02e9, 126_464, 500_000),
    "moe": (7.4e9, 157_184, 10_000),
}
TINY = [
    *"--mdm-device cpu --num-layers 2 --hidden-size 32 --num-attention-heads 4".split(),
    *"--ffn-hidden-size 32 --seq-length 32 --max-position-embeddings 32".split(),
    *"--micro-batch-size 2 --global-batch-size 8 --train-iters 4 --lr-warmup-iters 1".split(),
    *"--eval-iters 0 --log-interval 1 --num-workers 0 --split 90,10,0".split(),
]


def launch_line(model, *flags, data="text", **environment):
    """The words that the launcher would run."""
    result = subprocess.run(
        ["bash", str(FILES / "launch.sh"), model, str(data), "my.model", *flags],
        env={**os.environ, "DRY_RUN": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


def flags_of(words):
    return words[words.index("megatron_mdm.pretrain") + 1 :]


def test_every_model_is_tested():
    assert {path.stem for path in FILES.glob("*.flags")} == {"common", *MODELS}


@pytest.mark.parametrize("model", MODELS)
def test_flags_are_accepted_at_full_size_and_need_the_memory_that_the_file_says(
    tmp_path, data, model
):
    parameters, vocabulary, rotary_base = MODELS[model]
    argv = [
        *flags_of(launch_line(model, data=data)),
        *f"--mdm-device cpu --tokenizer-type NullTokenizer --vocab-size {vocabulary}".split(),
        *"--null-tokenizer-eod-id 0 --mdm-mask-token-id 5".split(),
    ]
    ranks.launch(tmp_path, 1, "--", *argv, entry=recipe)
    found = json.loads((tmp_path / "recipe.json").read_text())
    assert found["shape"]["vocab_size"] == vocabulary
    assert found["rotary_base"] == rotary_base
    assert ModelShape(**found["shape"]).num_parameters == pytest.approx(parameters, rel=0.01)
    said = re.search(
        r"# Memory of a rank of 8, GiB: (.*)\n", (FILES / f"{model}.flags").read_text()
    )
    expected = [f"{name} {value / 2**30:.1f}" for name, value in found["bytes"].items()]
    assert said[1] == ", ".join([*expected, f"in all {sum(found['bytes'].values()) / 2**30:.0f}"])
    if model in ("1b", "8b"):  # what README says of the masked head
        shape = ModelShape(**found["shape"])
        masked, causal = shape.training_flops(0.5), shape.training_flops(causal=True)
        readme = (ROOT / "README.md").read_text()
        for ratio in (shape.training_flops() / masked, causal / masked):
            assert f"{ratio:.2f} for the `{model}`" in readme


@pytest.mark.parametrize("model", MODELS)
def test_a_tiny_model_of_each_recipe_trains(tmp_path, data, model):
    """On 2 ranks, with the recipe's own parallelism as far as 2 ranks hold it."""
    words = flags_of(launch_line(model, data=data))
    changes = [*TINY, *ranks.TOKENIZER, "--save-interval", "4"]
    if model == "moe":
        changes += "--num-experts 4 --moe-ffn-hidden-size 16 --moe-router-topk 2".split()
        changes += ["--expert-model-parallel-size", "2"]
        words.remove("--moe-grouped-gemm")  # needs a GPU
    if "--lr-wsd-decay-iters" in words:
        changes += ["--lr-wsd-decay-iters", "2"]
    changes += ["--save", str(tmp_path / "checkpoint"), "--load", str(tmp_path / "checkpoint")]
    changes += ["--data-cache-path", str(tmp_path / "cache")]
    ranks.launch(tmp_path, 2, "--", *words, *changes, entry=entries.only_these_flags)
    output = (tmp_path / "rank1.log").read_text()
    assert output.count(" mdm iteration ") == 4 and "--mdm-recipe recommended" in "".join(
        (tmp_path / f"rank{i}.log").read_text() for i in range(2)
    )
    assert (tmp_path / "checkpoint/latest_checkpointed_iteration.txt").read_text().strip() == "4"


def test_launch_lines(tmp_path):
    words = launch_line("1b", "--lr", "1e-4")
    assert words[:3] == LAUNCHER.split() and words[3:6] == ["--nproc-per-node", "8", "--standalone"]
    assert words[6:8] == ["--local-addr", "127.0.0.1"]  # no name has to be resolved
    assert words[-2:] == ["--lr", "1e-4"] and "--fp8-format" not in words
    assert words[words.index("--tokenizer-type") + 1] == "SentencePieceTokenizer"
    assert not any("#" in word for word in words)

    words = launch_line("8b", NODES="4", MASTER="node0", FP8="tensorwise", GPUS="4")
    text = " ".join(words)
    assert text.startswith(f"{LAUNCHER} --nproc-per-node 4 --nnodes 4 --rdzv-id mdm")
    assert "--rdzv-endpoint node0:29500" in text
    assert "--fp8-format hybrid --fp8-recipe tensorwise" in text and "--fp8-margin" not in text
    assert "--fp8-recipe delayed --fp8-margin 4 " in " ".join(launch_line("1b", FP8="delayed"))

    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "n[7-8]" ] && printf "n7\\nn8\\n"\n')
    scontrol.chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "99",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[7-8]",
        "SLURM_CPUS_ON_NODE": "96",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    text = " ".join(launch_line("moe", **slurm))
    srun = "srun --ntasks-per-node 1 --cpus-per-task 96 --cpu-bind=none"
    assert text.startswith(f"{srun} {LAUNCHER} --nproc-per-node 8 --nnodes 2")
    assert "--rdzv-id 99 --rdzv-backend c10d --rdzv-endpoint n7:29500 -m megatron_mdm" in text


def test_mistakes_end_in_one_line():
    for words, environment, message in (
        (["1b"], {}, "error: three arguments are needed, MODEL DATA TOKENIZER"),
        (["2b", "x", "y"], {}, "error: there is no examples/pretrain/2b.flags"),
        (["1b", "x", "y"], {"NODES": "abc"}, "error: NODES=abc: give a number from 1 on"),
        (["1b", "x", "y"], {"GPUS": "0"}, "error: GPUS=0: give a number from 1 on"),
        (["1b", "x", "y"], {"NODES": "2"}, "error: NODES=2 needs MASTER"),
    ):
        result = subprocess.run(
            ["bash", str(FILES / "launch.sh"), *words],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2 and result.stderr.startswith(message)
        assert result.stderr.count("\n") == 1
