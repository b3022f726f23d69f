"""LLaDA-MoE in the program: experts over ranks, flags that describe them, and the way back."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_mdm.conversion.common import pair_tensors
from megatron_mdm.conversion.families import LLADA, LLADA_MOE, detect
from megatron_mdm.conversion.layout import LOCAL_NORM, TE_NORM, Heads
from megatron_mdm.conversion.safetensors_model import SINGLE
from megatron_mdm.conversion.to_hugging_face import to_hugging_face
from megatron_mdm.conversion.to_megatron import to_megatron
from megatron_mdm.conversion.torch_dist import DistCheckpoint, locate
from megatron_mdm.errors import UserError
from tests import ranks
from tests.conversion import models

CHANGES = {"vocab_size": 128, "mask_token_id": 127}
MODEL = [
    *"--num-layers 2 --num-attention-heads 4 --group-query-attention --num-query-groups 4".split(),
    *"--kv-channels 8 --ffn-hidden-size 48 --rotary-base 5000 --norm-epsilon 1e-5".split(),
    *"--max-position-embeddings 64 --padded-vocab-size 128 --qk-layernorm --num-experts 6".split(),
    *"--moe-ffn-hidden-size 12 --moe-router-topk 3 --moe-router-pre-softmax".split(),
]
TP = "--tensor-model-parallel-size 2 --sequence-parallel"
EP = "--expert-model-parallel-size 2 --moe-token-dispatcher-type"
LAYOUTS = {
    "1 rank": (1, ""),
    "EP 2": (2, f"{EP} allgather"),
    "TP 2, experts too": (2, TP),
    "TP 2 x EP 2": (2, f"{TP} {EP} alltoall --expert-tensor-parallel-size 1"),
    "HybridModel, EP 2": (2, f"{EP} allgather --mdm-model hybrid"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    models.make("llada-moe", root / "hf", **CHANGES)
    to_megatron(str(root / "hf"), str(root / "megatron"), log=lambda line: None)
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_over_ranks_have_the_same_loss_and_convert_back(layout, runs, model, tmp_path):
    assert runs[layout].masks() == runs["1 rank"].masks()
    assert runs[layout].losses == pytest.approx(runs["1 rank"].losses, rel=1e-5)
    checkpoint = str(runs[layout].checkpoint)
    to_hugging_face(checkpoint, str(tmp_path / "hf"), config_from=str(model / "hf"), verify=True)
    original, back = (load_file(d / SINGLE) for d in (model / "hf", tmp_path / "hf"))
    assert original.keys() == back.keys()
    assert all(torch.equal(original[name], back[name]) for name in original)


def test_a_run_with_other_experts_a_rank_is_read_by_two_tensor_parallel_ranks(
    runs, model, megatron_logits
):
    tokens = torch.arange(64).view(2, 32)
    ours = megatron_logits(runs["TP 2 x EP 2"].checkpoint, tokens, 2)["full"]
    assert (ours - models.logits(model / "hf", tokens, causal=False)).abs().max() < 1e-4


def test_flags_of_other_experts_are_named(flags, tmp_path):
    changed = [*flags, "--moe-router-topk", "2", "--moe-ffn-hidden-size", "16"]
    changed.remove("--moe-router-pre-softmax")
    run = ranks.launch(tmp_path, 1, *changed, check=False)
    (line,) = [line for line in run.output[0].splitlines() if line.startswith("error:")]
    assert run.status == [2] and line.count(" is ") == 4
    for text in (
        "--moe-router-topk is 3 in the checkpoint and 2 in the flags",
        "--moe-ffn-hidden-size is 12",
        "--moe-router-pre-softmax is True in the checkpoint and False",
    ):
        assert text in line


def test_the_launch_line_describes_the_experts(converted):
    words = {}
    assert any("--moe-aux-loss-coeff" in line for line in converted("llada-moe")[2])
    for kind in ("llada-moe", "llada-moe-dense"):
        words[kind] = (converted(kind)[1] / "launch.txt").read_text().replace("\\\n", "").split()
        text = " ".join(words[kind])
        assert "--num-experts 6 --moe-router-topk 3 --moe-ffn-hidden-size 12" in text.replace(
            "  ", " "
        )
        assert "--moe-router-pre-softmax" in words[kind] and "--qk-layernorm" in words[kind]
    assert "--moe-layer-freq" not in words["llada-moe"]  # equal layers share their keys
    assert "'[0,1,1]'" in words["llada-moe-dense"]


def test_other_routing_is_far_outside_the_tolerance(converted, monkeypatch):
    """Without --moe-router-pre-softmax the weights add up to 1, which the parity test detects."""
    source, _, _ = converted("llada-moe")
    tokens = torch.arange(32)[None]
    right, experts = models.logits(source, tokens, causal=False), models._experts

    def renormalised(y, w, prefix, chosen):
        probabilities = (y @ w[prefix + "gate.weight"].T).softmax(dim=-1)
        kept = probabilities.topk(chosen).values.sum(dim=-1, keepdim=True)
        return experts(y, w, prefix, chosen) / kept

    monkeypatch.setattr(models, "_experts", renormalised)
    assert (models.logits(source, tokens, causal=False) - right).abs().max() > 0.01


def test_both_layer_specifications_find_their_norm(converted):
    """Local layers keep the norm with the experts, Transformer Engine keeps it by itself."""
    for kind, first in (("llada-moe", 0), ("llada-moe-dense", 1)):
        source, checkpoint, _ = converted(kind)
        opened, tensors = DistCheckpoint(checkpoint), load_file(source / SINGLE)
        objects = opened._reader.read_metadata().state_dict_metadata
        name = "decoder.layers.{n}.pre_mlp_layernorm.weight"
        states = [key for key in objects if "pre_mlp_layernorm._extra_state" in key]
        assert len(states) == 2
        assert (locate(name, 0, opened.shapes) is None) == (first == 1)
        for n in range(first, first + 2):
            norm = tensors[f"model.layers.{n}.post_attention_layernorm.weight"]
            local = name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
            for key in (name, local):
                assert torch.equal(opened.read(locate(key, n, opened.shapes)), norm)


def test_the_norm_of_either_layer_specification_is_read(converted):
    source, checkpoint, _ = converted("llada-moe")
    config = json.loads((source / "config.json").read_text())
    shapes = DistCheckpoint(checkpoint).shapes
    keys = {f"decoder.layers.{name}" for name in (LOCAL_NORM, TE_NORM)}
    for key in keys:
        saved = {name: shape for name, shape in shapes.items() if name not in keys - {key}}
        found = pair_tensors(LLADA_MOE, config, saved, Heads(4, 4), models.VOCAB, "here")
        norms = [
            pair for pair in found if pair.names[0].endswith("post_attention_layernorm.weight")
        ]
        assert [place.key for pair in norms for place in pair.places] == [key, key]
    with pytest.raises(UserError, match=f"here lacks the tensor decoder.layers.0.{LOCAL_NORM}"):
        saved = {name: shape for name, shape in shapes.items() if name not in keys}
        pair_tensors(LLADA_MOE, config, saved, Heads(4, 4), models.VOCAB, "here")


def test_a_family_without_architectures_is_told_by_its_keys():
    for config, family in ((models.LLADA, LLADA), (models.LLADA_MOE, LLADA_MOE)):
        assert detect({k: v for k, v in config.items() if k != "architectures"}) is family
    assert detect({**models.LLADA_MOE, "architectures": ["LLaDAMoEModel"]}) is LLADA_MOE


@pytest.mark.parametrize(
    "change, message",
    [
        ({"moe_layer_freq": [1, 1, 1]}, "'moe_layer_freq' should be a list of 0 or 1 for each of"),
        ({"norm_topk_prob": True}, "norm_topk_prob = True is not supported for llada-moe"),
        ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size = 8 is not"),
        ({"num_experts": 5}, "has shape [6, 32], config.json implies [5, 32]"),
    ],
)
def test_other_experts_are_refused(change, message, tmp_path):
    source = models.make("llada-moe", tmp_path / "hf")
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError) as caught:
        to_megatron(str(source), str(tmp_path / "mg"))
    assert message in str(caught.value)
