"""The recipes of examples/pretrain: launch lines, their flags at full size, and tiny models."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mdm.errors import UserError
from megatron_mdm.sizing.flops import ModelShape
from megatron_mdm.sizing.nodes import Layout, check_nodes
from tests import ROOT, ranks
from tests.conversion import models
from tests.examples.recipe import recipe
from tests.ranks import entries
from tests.ranks.tools import run_forked

FILES = ROOT / "examples/pretrain"
LAUNCHER = "python -m megatron_mdm.launch"
# Properties that give the recipes their names: parameters, vocabulary size, rotary base.
MODELS = {
    "170m": (170e6 + 2 * 768 * 32_000, 32_000, 10_000),
    "1b": (1.49e9, 126_464, 10_000),
    "8b": (8.02e9, 126_464, 500_000),
    "8b_blocks": (8.19e9, 151_936, 1_000_000),
    "moe": (7.4e9, 157_184, 10_000),
}
# The python that runs the tests comes first, whether or not its environment is active.
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
TINY = [
    *"--mdm-device cpu --num-layers 2 --hidden-size 32 --num-attention-heads 4".split(),
    *"--ffn-hidden-size 32 --seq-length 32 --max-position-embeddings 32".split(),
    *"--micro-batch-size 2 --global-batch-size 8 --train-iters 4 --lr-warmup-iters 1".split(),
    *"--eval-iters 0 --log-interval 1 --num-workers 0".split(),
]


def launch_line(model, *flags, data="text", **environment):
    """The words of the command that the launcher would run."""
    result = subprocess.run(
        ["bash", str(FILES / "launch.sh"), model, str(data), "my.model", *flags],
        env={**os.environ, "PATH": PATH, "DRY_RUN": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


def values_of(words, flag):
    """The values of a flag at its last occurrence."""
    start = len(words) - words[::-1].index(flag)
    return list(itertools.takewhile(lambda word: not word.startswith("--"), words[start:]))


def flags_of(words):
    return words[words.index("megatron_mdm.pretrain") + 1 :]


def test_every_model_is_tested():
    assert {path.stem for path in FILES.glob("*.flags")} == {"common", *MODELS}


@pytest.mark.parametrize("model", MODELS)
def test_flags_are_accepted_at_full_size_and_need_what_the_file_says(tmp_path, data, model):
    """The file states the memory, the disk space and the numbers of nodes."""
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
    file = (FILES / f"{model}.flags").read_text()
    said = re.search(r"# Memory of a rank of 8, GiB: (.*)\n", file)
    expected = [f"{name} {value / 2**30:.1f}" for name, value in found["bytes"].items()]
    assert said[1] == ", ".join([*expected, f"in all {sum(found['bytes'].values()) / 2**30:.0f}"])

    *others, last = found["nodes"]
    nodes = f"{', '.join(map(str, others))} or {last}"
    assert f"# Nodes of 8 GPUs that share a step evenly: {nodes}\n" in file
    assert Layout.from_flags(argv).nodes(8) == found["nodes"]

    train, save, retain = (
        int(values_of(argv, flag)[0])
        for flag in ("--train-iters", "--save-interval", "--save-retain-interval")
    )
    assert retain % save == 0
    kept = len({*range(retain, train + 1, retain), train})
    # bfloat16 weights, float32 master weights and moments
    size = (2 + 12) * ModelShape(**found["shape"]).num_parameters
    total = f"{kept * size / 1e12:.1g}" if kept * size < 1e12 else f"{kept * size / 1e12:.1f}"
    assert f"# Checkpoints that stay: {kept} of {size / 1e9:.0f} GB, {total} TB\n" in file
    if model == "8b":
        page = " ".join((ROOT / "examples/scale/README.md").read_text().split())
        every = -(-train // save)
        assert f"would be {every} of them, or {every * size / 1e12:.0f} TB" in page
        assert f"and the last one: {kept}, or {total} TB" in page
    if model in ("1b", "8b"):  # numbers of the masked head in the benchmarks' guide
        shape = ModelShape(**found["shape"])
        masked, causal = shape.training_flops(0.5), shape.training_flops(causal=True)
        guide = " ".join((ROOT / "tools/benchmarks/README.md").read_text().split())
        for ratio in (shape.training_flops() / masked, causal / masked):
            assert f"{ratio:.2f} for the `{model}`" in guide


@pytest.mark.parametrize("model", MODELS)
def test_a_tiny_model_of_each_recipe_trains(tmp_path, data, model):
    """Trains on 2 ranks, with the recipe's parallelism as far as 2 ranks allow; it stops once.

    The data are a prefix, a blend, and a blend that a flag names. A recipe that converts a model
    first starts from a tiny one.
    """
    if model == "1b":
        own, source = ["--train-data-path", "0.7", str(data), "0.3", str(data)], "-"
    else:
        own, source = ["--split", "90,10,0"], f"0.7 {data} 0.3 {data}" if model == "8b" else data
    words = flags_of(launch_line(model, *own, data=source))
    assert "--ckpt-fully-parallel-load" in words
    changes = [*TINY, *ranks.TOKENIZER, *"--save-interval 1 --save-retain-interval 2".split()]
    if model == "moe":
        changes += "--num-experts 4 --moe-ffn-hidden-size 16 --moe-router-topk 2".split()
        changes += ["--expert-model-parallel-size", "2"]
        words.remove("--moe-grouped-gemm")  # needs a GPU
        # The guide of mcore says that the other kind depends on the micro-batch size.
        assert values_of(words, "--moe-router-load-balancing-type") == ["seq_aux_loss"]
    if model == "8b_blocks":
        changes += "--tensor-model-parallel-size 2 --num-query-groups 2 --kv-channels 8".split()
        changes += "--mdm-block-size 8 --padded-vocab-size 128".split()
        changes += ["--pretrained-checkpoint", converted(model, tmp_path)]
    if "--lr-wsd-decay-iters" in words:
        changes += ["--lr-wsd-decay-iters", "2"]
    changes += ["--save", str(tmp_path / "checkpoint"), "--load", str(tmp_path / "checkpoint")]
    changes += ["--data-cache-path", str(tmp_path / "cache")]
    output = ""
    for part in (["--exit-interval", "3"], []):
        ranks.launch(tmp_path, 2, "--", *words, *changes, *part, entry=entries.only_these_flags)
        output += (tmp_path / "rank1.log").read_text()
        recipe = "ppots" if model == "8b_blocks" else "recommended"
        assert f"--mdm-recipe {recipe}" in "".join(
            (tmp_path / f"rank{i}.log").read_text() for i in range(2)
        )
    assert re.findall(r" mdm iteration +(\d+)", output) == ["1", "2", "3", "4"]
    assert (tmp_path / "checkpoint/latest_checkpointed_iteration.txt").read_text().strip() == "4"
    kept = sorted(path.name for path in (tmp_path / "checkpoint").glob("iter_*"))
    assert kept == ["iter_0000002", "iter_0000004"]


def converted(model, directory):
    """Runs the line of the recipe's head that converts a model, on a tiny one of the same form."""
    sizes = {"vocab_size": ranks.MASK_ID, "intermediate_size": 32, "head_dim": 8}
    sizes |= {"rope_theta": 1e6, "rms_norm_eps": 1e-6}
    models.make("qwen3", directory / "Qwen3-8B", **sizes)
    line = re.search(r"python (tools/.*)", (FILES / f"{model}.flags").read_text())[1]
    tool, *flags = shlex.split(line)
    run = run_forked(str(ROOT / tool), *flags, directory=directory)
    assert run.returncode == 0, run.stderr
    return str(directory / flags[flags.index("--output") + 1])


def test_launch_lines(tmp_path):
    words = launch_line("1b", "--lr", "1e-4")
    assert words[:3] == LAUNCHER.split() and words[3:6] == ["--nproc-per-node", "8", "--standalone"]
    assert words[6:8] == ["--local-addr", "127.0.0.1"]  # no name needs to be resolved
    assert words[-2:] == ["--lr", "1e-4"] and "--fp8-format" not in words
    assert words[words.index("--tokenizer-type") + 1] == "SentencePieceTokenizer"
    assert not any("#" in word for word in words)

    words = launch_line("8b", NODES="4", MASTER="node0", FP8="tensorwise", GPUS="4")
    text = " ".join(words)
    assert text.startswith(f"{LAUNCHER} --nproc-per-node 4 --nnodes 4 --rdzv-id mdm")
    assert "--rdzv-endpoint node0:29500" in text
    assert "--fp8-format hybrid --fp8-recipe tensorwise" in text and "--fp8-margin" not in text
    assert "--fp8-recipe delayed --fp8-margin 4 " in " ".join(launch_line("1b", FP8="delayed"))

    text = " ".join(launch_line("moe", **slurm(tmp_path)))
    assert text.startswith(f"{SRUN} {LAUNCHER} --nproc-per-node 8 --nnodes 2")
    assert "--rdzv-id 99 --rdzv-backend c10d --rdzv-endpoint n7:29500 -m megatron_mdm" in text


SRUN = "srun --ntasks-per-node 1 --cpus-per-task 96 --cpu-bind=none"


def slurm(directory):
    """The environment of a job on two nodes, with a scontrol in `directory` that knows them."""
    scontrol = directory / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "n[7-8]" ] && printf "n7\\nn8\\n"\n')
    scontrol.chmod(0o755)
    return {
        "SLURM_JOB_ID": "99",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[7-8]",
        "SLURM_CPUS_ON_NODE": "96",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "PATH": f"{directory}:{PATH}",
    }


def test_a_rehearsal_in_a_job_has_the_nodes_that_it_names(tmp_path):
    environment = {**os.environ, **slurm(tmp_path), "REHEARSE": "1", "NODES": "160"}
    (tmp_path / "python").write_text('#!/bin/sh\necho "$*"\n')
    (tmp_path / "python").chmod(0o755)
    command = ["bash", str(FILES / "launch.sh"), "8b", "text", "my.model"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "-m megatron_mdm.rehearse --nodes 160 --gpus-per-node 8" in run.stdout, run.stderr


def test_a_job_finds_the_checkout(tmp_path):
    """sbatch runs a copy of the script, and other commands may start it from anywhere."""
    elsewhere = {**slurm(tmp_path), "SLURM_SUBMIT_DIR": str(tmp_path)}
    assert "--nnodes" in launch_line("8b", **elsewhere)
    copy = tmp_path / "spool/job99/slurm_script"
    copy.parent.mkdir(parents=True)
    shutil.copy(FILES / "launch.sh", copy)
    for environment, status in ((slurm(tmp_path), 0), (elsewhere, 2)):
        run = subprocess.run(
            ["bash", str(copy), "8b", "text", "my.model"],
            env={**os.environ, **environment, "DRY_RUN": "1"},
            capture_output=True,
            text=True,
        )
        assert run.returncode == status, run.stderr
    message = f"{tmp_path} has no examples/pretrain: run sbatch in the checkout's directory"
    assert run.stderr == f"error: {message}\n"


IMAGE = "nvcr.io#nvidia/nemo:26.08"


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, [f"--container-mounts={ROOT}"]),
        (
            {"MOUNTS": "/data,/big disk:/runs:ro", "PYTHONPATH": "/packages"},
            [f"--container-mounts={ROOT},/data,/big disk:/runs:ro", "--container-env=PYTHONPATH"],
        ),
    ],
)
def test_a_container_under_slurm(given, options, tmp_path):
    environment = {**slurm(tmp_path), "CONTAINER": IMAGE, "PYTHONPATH": "", **given}
    words = launch_line("8b", **environment)
    start, place = SRUN.split(), words.index("python")
    assert words[: len(start)] == start
    fixed = [
        f"--container-image={IMAGE}",
        f"--container-workdir={ROOT}",
        "--no-container-mount-home",
    ]
    assert sorted(words[len(start) : place]) == sorted([*fixed, *options])
    plain = launch_line("8b", **{**environment, "CONTAINER": ""})
    assert words[place:] == plain[len(start) :]


def test_the_host_of_a_container_needs_no_python(tmp_path):
    """A host with Python 3.12 still refuses numbers of nodes that do not fit."""
    environment = {**slurm(tmp_path), "CONTAINER": IMAGE}
    unfit = ["--global-batch-size", "24"]
    command = ["bash", str(FILES / "launch.sh"), "8b", "text", "my.model", *unfit]
    with_python = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert with_python.returncode == 2
    assert with_python.stderr.startswith("error: 2 nodes of 8 GPUs cannot share the run evenly")
    for name in ("python", "python3"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 9\n")
        (tmp_path / name).chmod(0o755)
    words = launch_line("8b", *unfit, **environment)
    assert words[0] == "srun" and words[-2:] == unfit


def test_mistakes_end_in_one_line():
    for words, environment, message in (
        (["1b"], {}, "error: three arguments are needed, MODEL DATA TOKENIZER"),
        (["2b", "x", "y"], {}, "error: there is no examples/pretrain/2b.flags"),
        (["1b", "x", "y"], {"NODES": "abc"}, "error: NODES=abc: give a number from 1 on"),
        (["1b", "x", "y"], {"GPUS": "0"}, "error: GPUS=0: give a number from 1 on"),
        (["1b", "x", "y"], {"NODES": "2"}, "error: NODES=2 needs MASTER"),
        (["1b", "x", "y"], {"CONTAINER": "a:1"}, "error: CONTAINER=a:1 needs Slurm with pyxis"),
        (
            ["1b", "x", "y"],
            {"NODES": "3", "MASTER": "node0"},
            "error: 3 nodes of 8 GPUs cannot share the run evenly (--global-batch-size 1280, "
            "--micro-batch-size 4): take 1, 2, 4, 5, 8, 10, 20 or 40 nodes, or change these flags",
        ),
        (
            ["170m", "x", "y", "--micro-batch-size", "six"],
            {},
            "error: --micro-batch-size: six is not a whole number of at least 1",
        ),
    ):
        result = subprocess.run(
            ["bash", str(FILES / "launch.sh"), *words],
            env={**os.environ, "PATH": PATH, **environment},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2 and result.stderr.startswith(message)
        assert result.stderr.count("\n") == 1


def test_numbers_of_nodes():
    experts = "--expert-model-parallel-size 8 --global-batch-size 64 --micro-batch-size 1".split()
    assert Layout.from_flags(experts).nodes(4) == [2, 4, 8, 16]  # one node cannot hold the experts
    pipeline = "--pipeline-model-parallel-size=3 --global-batch-size=8 --micro-batch-size=2"
    layout = Layout.from_flags(["--lr", "1", *pipeline.split(), "--micro-batch-size", "1"])
    assert [ranks for ranks in range(1, 100) if layout.fits(ranks)] == [3, 6, 12, 24]
    with pytest.raises(UserError) as caught:
        check_nodes(layout, 1, 8)
    assert str(caught.value) == (
        "1 node of 8 GPUs cannot share the run evenly (--global-batch-size 8, --micro-batch-size "
        "1, --pipeline-model-parallel-size 3): take 3 nodes, or change these flags"
    )
    with pytest.raises(UserError, match="take another number of GPUs a node, or change these"):
        check_nodes(layout, 1, 5)
    check_nodes(Layout(), 1, 5)  # Megatron refuses a missing batch size
    evaluated = Layout.from_flags([*experts, "--eval-global-batch-size", "16"])
    assert evaluated.nodes(4) == [2, 4]


def test_data_are_a_prefix_a_blend_or_flags_of_their_own(data):
    def paths(words):
        return values_of(words, "--data-path")

    assert paths(launch_line("1b", data="text")) == ["text"]
    assert paths(launch_line("1b", data="0.7 a  0.3 b")) == ["0.7", "a", "0.3", "b"]
    spaced = data.parent / "a name"
    spaced.with_suffix(".idx").touch()
    assert paths(launch_line("1b", data=spaced)) == [str(spaced)]
    own = "--train-data-path 0.7 a 0.3 b --valid-data-path c".split()
    words = launch_line("1b", *own, data="-")
    assert words[-len(own) :] == own and "--data-path" not in words and "--split" not in words


def test_runs_have_names():
    for environment, name in (({}, "1b"), ({"RUN": "second"}, "second")):
        words = launch_line("1b", **environment)
        for flag, part in (
            *(("--save", "checkpoint"), ("--load", "checkpoint")),
            *(("--tensorboard-dir", "tb"), ("--data-cache-path", "cache")),
        ):
            assert values_of(words, flag) == [f"runs/{name}/{part}"]


def test_flags_for_torchrun_come_before_the_program():
    words = launch_line("1b", TORCHRUN="--max-restarts 3  --log-dir logs")
    place = words.index("--max-restarts")
    rest = ["--max-restarts", "3", "--log-dir", "logs", "-m", "megatron_mdm.pretrain"]
    assert words[place : place + 6] == rest


def test_the_first_of_many_nodes_is_found_each_time(tmp_path):
    """scontrol may still be writing names when the first name has been read."""
    names = [f"node{i:04d}-{'x' * 200}" for i in range(600)]
    (tmp_path / "names").write_text("".join(f"{name}\n" for name in names))
    scontrol = tmp_path / "scontrol"
    # Writes line by line, like a slow writer.
    scontrol.write_text(f"#!/bin/bash\nwhile read -r n; do echo $n; done <{tmp_path}/names\n")
    scontrol.chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "99",
        "SLURM_JOB_NUM_NODES": "160",
        "SLURM_JOB_NODELIST": "node[0000-0599]",
        "SLURM_CPUS_ON_NODE": "96",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "PATH": f"{tmp_path}:{PATH}",
    }
    for _ in range(40):
        words = launch_line("8b", **slurm)
        assert values_of(words, "--rdzv-endpoint")[0] == f"{names[0]}:29500"


def test_what_slurm_is_asked_for():
    lines = (FILES / "launch.sh").read_text().splitlines()
    words = " ".join(line for line in lines if line.startswith("#SBATCH ")).split()
    assert {"--requeue", "--open-mode=append", "--signal=USR1@600"} <= set(words)
    assert {"--time=24:00:00", "--output=slurm-%j.out"} <= set(words)


STANDS_IN = """#!/bin/bash
[ "$2" = megatron_mdm.sizing.nodes ] || env | grep "^PYTORCH.*ALLOC_CONF" || true
"""


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, "PYTORCH_CUDA_ALLOC_CONF="),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "PYTORCH_ALLOC_CONF=backend:native"),
    ],
)
def test_memory_grows_in_place_unless_the_user_says_otherwise(given, seen, tmp_path):
    (tmp_path / "python").write_text(STANDS_IN)
    (tmp_path / "python").chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    result = subprocess.run(
        ["bash", str(FILES / "launch.sh"), "1b", "text", "my.model"],
        env={**kept, "PATH": f"{tmp_path}:{PATH}", **given},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and result.stdout.strip() == seen, result.stderr
