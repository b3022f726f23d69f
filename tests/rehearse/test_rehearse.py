"""Launches of many nodes, rehearsed by single processes."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from megatron_mdm.errors import UserError
from megatron_mdm.rehearse import __main__ as program
from megatron_mdm.rehearse.flags import for_a_cpu, missing_inputs, without_inputs
from megatron_mdm.rehearse.rank import NewMemoryIsZero
from megatron_mdm.rehearse.roles import roles
from megatron_mdm.sizing.nodes import Layout
from tests import ROOT, ranks
from tests.rehearse.entries import played, recorded

RECIPES = ROOT / "examples/pretrain"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
LAYERS = "--num-layers"
VOCABULARIES = {"170m": 32_000, "1b": 126_464, "8b": 126_464, "moe": 157_184}


def play(directory, words, nodes, gpus=8, choose=-1):
    """What one role of a launch finds, in a fork of the tests' server."""
    role = roles(Layout.from_flags(words), nodes, gpus, words)[choose]
    ranks.launch(directory, 1, "--", json.dumps(asdict(role)), *words, entry=played)
    return json.loads((directory / "found.json").read_text())


def recipe(name):
    lines = [
        line.partition("#")[0]
        for file in ("common", name)
        for line in (RECIPES / f"{file}.flags").read_text().splitlines()
    ]
    saves = ["--save", "nowhere", "--load", "nowhere"]
    return without_inputs([*shlex.split(" ".join(lines)), *saves], VOCABULARIES[name])


def test_flags_that_a_cpu_cannot_rehearse_are_taken_out():
    words = "--bf16 --fp8-format hybrid --lr=1 --recompute-modules moe_act mlp --te-x --seed 3"
    kept, left_out = for_a_cpu(words.split())
    cpu = "--mdm-device cpu --fake-process-group --num-workers 0"
    assert kept == f"--bf16 --lr 1 --recompute-modules mlp --seed 3 {cpu}".split()
    assert left_out == "--fp8-format hybrid --recompute-modules moe_act --te-x".split()
    assert for_a_cpu(["--mdm-device", "cuda"]) == (cpu.split(), [])
    with pytest.raises(UserError, match="only Transformer Engine has its layers"):
        for_a_cpu(["--multi-latent-attention"])
    with pytest.raises(UserError, match="x is not a flag"):
        for_a_cpu(["x", "--lr", "1"])


def test_buffers_that_nobody_fills_have_zeros():
    number = torch.full((1000,), 7.0)
    del number  # the next tensor of this size gets its memory
    with NewMemoryIsZero():
        assert not torch.empty(1000, requires_grad=True).any()


def test_missing_files_are_all_named(tmp_path):
    (tmp_path / "a.bin").touch()
    words = ["--data-path", "0.5", f"{tmp_path}/a", "0.5", f"{tmp_path}/b", "--tokenizer-model"]
    found = missing_inputs([*words, f"{tmp_path}/t"])
    paths = [f"--data-path {tmp_path}/{name}" for name in ("a.idx", "b.bin", "b.idx")]
    assert found == [*paths, f"--tokenizer-model {tmp_path}/t"]
    assert missing_inputs(without_inputs(words, 128)) == []


def test_roles_are_the_ends_of_the_launch():
    flags = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4".split()
    flags += ["--context-parallel-size", "2"]
    found = roles(Layout.from_flags(flags), 8, 8, flags)
    # 64 ranks: tensor 2, context 2, data 4, pipeline 4, in this order.
    assert [(r.rank, r.stage, r.data, r.context) for r in found] == [
        *((0, 0, 0, 0), (14, 0, 3, 1), (48, 3, 0, 0), (62, 3, 3, 1), (16, 1, 0, 0))
    ]
    flags.append("--use-tp-pp-dp-mapping")
    assert [r.rank for r in roles(Layout.from_flags(flags), 8, 8, flags)] == [0, 50, 12, 62, 4]
    assert [r.rank for r in roles(Layout(), 1, 1, [])] == [0]


def refusal(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["rehearse", *words])
    with pytest.raises(UserError) as caught:
        program.main()
    return str(caught.value)


def test_batches_that_do_not_fit_and_missing_files_are_refused(monkeypatch, tmp_path):
    batch = "--global-batch-size 1280 --micro-batch-size 4".split()
    line = refusal(monkeypatch, ["--nodes", "24", "--", *batch])
    assert line.startswith("24 nodes of 8 GPUs cannot share the run evenly") and "or 40" in line
    line = refusal(monkeypatch, ["--nodes", "1", "--", *batch, "--data-path", f"{tmp_path}/x"])
    assert f"{tmp_path}/x.bin, --data-path {tmp_path}/x.idx" in line and "--without-inp" in line
    assert "--mfu 2" in refusal(monkeypatch, ["--nodes", "1", "--mfu", "2", "--", *batch])


# (recipe, nodes): the launches that the guides of examples/ name.
LAUNCHES = [("1b", 20), ("8b", 4), ("170m", 1), ("moe", 8)]


@pytest.mark.parametrize(("name", "nodes"), LAUNCHES)
def test_recipes_start_at_their_numbers_of_nodes(tmp_path, name, nodes):
    words = recipe(name)
    if name == "170m":  # also with fits during training
        words += ["--mdm-recipe", "ppots"]
    found = play(tmp_path, words, nodes)
    assert "refusal" not in found and "failure" not in found, found
    file = (RECIPES / f"{name}.flags").read_text()
    assert found["steps"] == 2
    course = found["course"]
    size = f"{course['checkpoint_bytes'] / 1e9:.0f}"
    assert f"# Checkpoints that stay: {course['checkpoints']} of {size} GB, " in file
    replicas = 8 * nodes // Layout.from_flags(words).replica
    layers, micro = (int(words[words.index(flag) + 1]) for flag in (LAYERS, "--micro-batch-size"))
    assert found["micro_batches"] * micro * replicas == course["rows"]
    assert found["stage"]["layers"] + found["stage"]["moe_layers"] == layers
    if name == "8b":  # the table in examples/scale/README.md
        state = sum(found["bytes"][part] for part in ("weights", "gradients", "optimizer"))
        assert state / 2**30 == pytest.approx(22.4 + (33.6 - 22.4) / nodes, abs=0.1)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--no-mdm-eod-attended", "--no-mdm-eod-attended work with --transformer-impl local only"),
        ("--mdm-model hybrid --qk-layernorm", "--qk-layernorm does not reach HybridModel's layers"),
        ("--fp8-format hybrid --ffn-hidden-size 24", "--ffn-hidden-size must be a multiple of 16"),
    ],
)
def test_flags_that_only_layers_on_a_gpu_read_are_checked(tmp_path, flags, line):
    tiny = f"{LAYERS} 2 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 32 {flags}"
    assert line in play(tmp_path, [*recipe("170m"), *tiny.split()], 1)["refusal"]


def test_a_middle_stage_and_context_parallel_ranks_take_their_steps(tmp_path):
    flags = [
        *"--pipeline-model-parallel-size 4 --context-parallel-size 2".split(),
        *"--num-layers-per-virtual-pipeline-stage 4 --global-batch-size 4096".split(),
    ]
    words = [*recipe("8b"), *flags]
    last = play(tmp_path / "last", words, 128, choose=3)
    middle = play(tmp_path / "middle", words, 128, choose=4)
    for found, has_head in ((last, True), (middle, False)):
        assert "refusal" not in found and "failure" not in found, found
        assert found["steps"] == 2
        assert found["stage"]["layers"] == 8 and found["stage"]["has_head"] is has_head
        # 4096 rows = 64 replicas x 2 rows x 32 micro-batches
        assert found["micro_batches"] == 32 and found["bubble"] == 3 / (2 * 32)
    head = last["stage"]["dense"] - middle["stage"]["dense"]
    assert head == 4096 * 126_464 // 2 + 4096  # the output layer and the last norm


def test_ranks_of_1024_read_the_rows_masks_and_rates_of_one_process(tmp_path, data):
    flags = [
        *("--data-path", str(data), "--data-cache-path", str(tmp_path / "cache")),
        *"--mdm-quantiles strata --global-batch-size 2048 --seed 7".split(),
    ]
    one = ranks.launch(
        tmp_path / "one", 1, *flags, "--micro-batch-size", "512", "--train-iters", "2"
    )
    model = [*ranks.MODEL, *ranks.TOKENIZER, *ranks.TRAINING, *flags, "--train-iters", "100"]
    alone = one.masks()
    assert len(alone) == 4096
    words = [*model, "--micro-batch-size", "1"]
    layout = Layout.from_flags(words)
    seen = {}
    for rank in (0, 371, 1023):
        role = roles(layout, 128, 8, words)[0]
        role = type(role)(1024, 8, rank, 0, rank, 0, f"rank {rank}")
        run = ranks.launch(
            tmp_path / str(rank), 1, "--", json.dumps(asdict(role)), *words, entry=recorded
        )
        found = json.loads((tmp_path / str(rank) / "found.json").read_text())
        assert "refusal" not in found and "failure" not in found, found
        masks = run.masks()
        # Two micro-batches of one row in a step, and two steps.
        assert {row for _, row in masks} == {rank + 1024 * i for i in range(4)}
        assert all(alone[key] == value for key, value in masks.items())
        seen |= masks
    assert len(seen) == 12


def test_the_launch_script_rehearses(tmp_path, data):
    tiny = [
        *"--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64".split(),
        *"--seq-length 32 --max-position-embeddings 32 --train-iters 40".split(),
        *"--lr-warmup-iters 1 --eval-iters 1 --fp8-format hybrid".split(),
        *"--tokenizer-type NullTokenizer --vocab-size 127 --null-tokenizer-eod-id 119".split(),
        *"--mdm-mask-token-id 127".split(),
    ]
    (tmp_path / "my.model").touch()
    command = ["bash", str(RECIPES / "launch.sh"), "170m", str(data), str(tmp_path / "my.model")]
    run = tmp_path.name
    environment = {**os.environ, "PATH": PATH, "REHEARSE": "1", "NODES": "2", "RUN": run}
    result = subprocess.run(
        [*command, *tiny, "--split", "90,10,0"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "accepted: 16 ranks" in result.stdout
    assert "rank 15 of 16, data-parallel rank 15 of 16: start" in result.stdout
    assert f"not rehearsed: --tensorboard-dir runs/{run}/tb --fp8-format hybrid" in result.stdout
    assert "an iteration: 256 rows of 256 texts, 8,192 tokens; 1 micro-batch a" in result.stdout
    assert not (ROOT / "runs" / run).exists()
