"""A converted checkpoint in the program: every layout, its arguments, and the way back."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from megatron_mdm.conversion.safetensors_model import SINGLE
from megatron_mdm.conversion.to_hugging_face import to_hugging_face
from megatron_mdm.conversion.to_megatron import to_megatron
from tests import ranks
from tests.conversion import models

# LLaDA with grouped queries, in the vocabulary of the tests' data.
CHANGES = {"n_kv_heads": 2, "vocab_size": 128, "embedding_size": 128, "mask_token_id": 127}
MODEL = [
    *"--num-layers 2 --num-attention-heads 4 --group-query-attention --num-query-groups 2".split(),
    *"--kv-channels 8 --ffn-hidden-size 48 --rotary-base 5000 --norm-epsilon 1e-5".split(),
    *"--max-position-embeddings 64 --padded-vocab-size 128".split(),
]
LAYOUTS = {
    "1 rank": (1, ""),
    "TP 2": (2, "--tensor-model-parallel-size 2"),
    "PP 2": (2, "--pipeline-model-parallel-size 2"),
    "TP 2 x PP 2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "HybridModel, PP 2": (2, "--pipeline-model-parallel-size 2 --mdm-model hybrid"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("llada")
    models.make("llada", root / "hf", **CHANGES)
    to_megatron(str(root / "hf"), str(root / "megatron"), log=lambda line: None)
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_is_the_same_under_every_layout(layout, runs):
    reference = runs["1 rank"]
    assert runs[layout].masks() == reference.masks()
    assert runs[layout].losses == pytest.approx(reference.losses, rel=1e-5)
    assert runs[layout].grad_norms == pytest.approx(reference.grad_norms, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_way_back_from_every_layout_is_bitwise(layout, runs, model, tmp_path):
    to_hugging_face(
        str(runs[layout].checkpoint),
        str(tmp_path / "hf"),
        config_from=str(model / "hf"),
        verify=True,
        log=lambda line: None,
    )
    original, back = (load_file(d / SINGLE) for d in (model / "hf", tmp_path / "hf"))
    assert original.keys() == back.keys()
    assert all(torch.equal(original[name], back[name]) for name in original)


@pytest.mark.parametrize(
    "change, named",
    [
        ("--norm-epsilon 1e-6", "--norm-epsilon is 1e-05 in the checkpoint and 1e-06"),
        ("--add-qkv-bias", "--add-qkv-bias is False in the checkpoint and True"),
        ("--rotary-base 10000", "--rotary-base is 5000"),
        ("--qk-layernorm", "--qk-layernorm is False"),
    ],
)
def test_flags_of_another_model_are_named(change, named, flags, tmp_path):
    run = ranks.launch(tmp_path, 1, *flags, *change.split(), check=False)
    (line,) = [line for line in run.output[0].splitlines() if line.startswith("error:")]
    assert run.status == [2] and named in line and line.count(" is ") == 2


def test_the_saved_arguments_restore_the_model(flags, runs, tmp_path):
    """Uses --use-checkpoint-args, and sets by hand the arguments that Megatron does not restore."""
    by_hand = "--norm-epsilon", "1e-5", "--max-position-embeddings", "64", "--seq-length", "32"
    i = flags.index(MODEL[0])
    given = [*flags[:i], *by_hand, *flags[i + len(MODEL) :], "--use-checkpoint-args"]
    ours = ["--tensorboard-dir", str(tmp_path / "tb")]
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    launcher["MASTER_PORT"] = "0"  # the only rank listens on any free port
    words = [*ranks.TOKENIZER, *ranks.TRAINING, *given, *ours]
    run = subprocess.run(
        [sys.executable, "-m", "megatron_mdm.pretrain", *words],
        capture_output=True,
        text=True,
        timeout=170,
        env={**os.environ, **launcher},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert ranks.read_scalars(tmp_path / "tb")["mdm loss"] == runs["1 rank"].losses
