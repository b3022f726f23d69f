"""LLaDA2: its router against two references, the biases of its experts, and what serving reads."""

import json
from itertools import pairwise

import pytest
import torch
from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.transformer.moe.moe_utils import group_limited_topk
from safetensors.torch import load_file, save_file

from megatron_mdm.conversion import megatron_model
from megatron_mdm.conversion.families import LLADA2, detect
from megatron_mdm.conversion.family import model_flags
from megatron_mdm.conversion.safetensors_model import SINGLE
from megatron_mdm.conversion.to_hugging_face import to_hugging_face
from megatron_mdm.conversion.to_megatron import to_megatron
from megatron_mdm.conversion.torch_dist import DistCheckpoint
from tests.conversion import llada2, models
from tests.conversion.test_round_trip import TOLERANCE, same_files, silent

CHANGES = {"vocab_size": 128, "mask_token_id": 127}
ROUTER = [
    *"--moe-router-score-function sigmoid --moe-router-enable-expert-bias".split(),
    *"--moe-router-dtype fp32 --moe-router-topk 4 --moe-router-num-groups 4".split(),
    *"--moe-router-group-topk 2 --moe-router-topk-scaling-factor 2.5".split(),
]
MODEL = [
    *"--num-layers 3 --num-attention-heads 4 --group-query-attention --num-query-groups 2".split(),
    *"--kv-channels 16 --ffn-hidden-size 48 --rotary-base 5000 --rotary-percent 0.5".split(),
    *"--max-position-embeddings 128 --padded-vocab-size 128 --norm-epsilon 1e-6".split(),
    *"--qk-layernorm --num-experts 12 --moe-ffn-hidden-size 12 --moe-layer-freq [0,1,1]".split(),
    *"--moe-shared-expert-intermediate-size 12 --moe-router-bias-update-rate 0".split(),
    *["--mdm-block-size", "8", *ROUTER],
]
TP = "--tensor-model-parallel-size 2 --sequence-parallel"
EP = "--expert-model-parallel-size 2 --moe-token-dispatcher-type"
BIASES_MOVE = "--moe-router-bias-update-rate 1e-3"
LAYOUTS = {
    "1 rank": (1, ""),
    "EP 2": (2, f"{EP} allgather"),
    "TP 2, experts too": (2, TP),
    "TP 2 x EP 2": (2, f"{TP} {EP} alltoall --expert-tensor-parallel-size 1"),
    "1 rank, biases move": (1, BIASES_MOVE),
    "TP 2 x EP 2, biases move": (
        2,
        f"{TP} {EP} alltoall --expert-tensor-parallel-size 1 {BIASES_MOVE}",
    ),
}
STAYING = [name for name in LAYOUTS if "move" not in name]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("llada2")
    models.make("llada2", root / "hf", **CHANGES)
    to_megatron(str(root / "hf"), str(root / "megatron"), **silent)
    return root


def biases(tensors):
    return {name: tensor for name, tensor in tensors.items() if name.endswith("expert_bias")}


def test_the_references_agree_and_see_every_part_of_the_router(tmp_path):
    source = models.make("llada2", tmp_path / "hf")
    tokens = torch.randint(0, models.VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    glm = llada2.as_glm4_moe(source)
    with torch.no_grad():
        theirs = glm(tokens, attention_mask=torch.zeros(2, 1, 24, 24)).logits
    weights = load_file(source / SINGLE)

    def logits(tensors, **changes):
        return models.published_logits({**models.LLADA2, **changes}, tensors, tokens)

    ours = logits(weights)
    assert ours.abs().max() > 1 and (ours - theirs).abs().max() < TOLERANCE / 10
    unbiased = {n: t * 0 if n.endswith("expert_bias") else t for n, t in weights.items()}
    halves = {n: t.roll(4, 0) if "query_key_value" in n else t for n, t in weights.items()}
    for other in (
        logits(unbiased),
        logits(halves),
        logits(weights, n_group=1, topk_group=1),
        logits(weights, n_group=6),
        logits(weights, routed_scaling_factor=1),
        logits(weights, partial_rotary_factor=1),
        logits(weights, num_experts_per_tok=5),
    ):
        assert (other - ours).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("layout", STAYING)
def test_experts_over_ranks_have_the_same_loss_and_convert_back(layout, runs, model, tmp_path):
    assert runs[layout].masks() == runs["1 rank"].masks()
    assert runs[layout].losses == pytest.approx(runs["1 rank"].losses, rel=1e-5)
    assert runs[layout].grad_norms == pytest.approx(runs["1 rank"].grad_norms, rel=1e-5)
    checkpoint = str(runs[layout].checkpoint)
    to_hugging_face(
        checkpoint, str(tmp_path / "hf"), config_from=str(model / "hf"), verify=True, **silent
    )
    assert same_files(model / "hf" / SINGLE, tmp_path / "hf" / SINGLE)


def test_two_ranks_read_the_experts_of_a_run(runs, model, megatron_logits):
    tokens = torch.arange(64).view(2, 32)
    ours = megatron_logits(runs["TP 2 x EP 2"].checkpoint, tokens, 2)["full"]
    assert (ours - models.logits(model / "hf", tokens, causal=False)).abs().max() < TOLERANCE


def test_a_rate_moves_the_biases_without_a_learning_rate_and_alike_over_ranks(
    runs, model, tmp_path
):
    """Two steps move a bias by -2, -1, 0, 1 or 2 times the rate: hence rate 0 in launch.txt."""
    found = []
    for layout in LAYOUTS.keys() - set(STAYING):
        output = tmp_path / str(len(found))
        to_hugging_face(
            str(runs[layout].checkpoint), str(output), config_from=str(model / "hf"), **silent
        )
        found.append(load_file(output / SINGLE))
    before = load_file(model / "hf" / SINGLE)
    one, other = found
    for name, tensor in before.items():
        assert torch.equal(one[name], other[name])
        steps = (one[name] - tensor) / 1e-3
        if name.endswith("expert_bias"):
            torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
            assert 1 <= steps.abs().max().round() <= 2
        else:
            assert not steps.any()


def test_the_launch_line_describes_router_and_experts(converted):
    _, checkpoint, said = converted("llada2")
    words = " ".join((checkpoint / "launch.txt").read_text().replace("\\\n", "").split()).split()
    values = dict(pairwise(words))
    wanted = {name: value for name, value in pairwise(ROUTER) if not value.startswith("--")}
    assert {
        name: values[name] for name in wanted if name.startswith("--")
    }.items() <= wanted.items()
    assert "--moe-router-enable-expert-bias" in words
    assert values["--moe-shared-expert-intermediate-size"] == "12"
    assert values["--moe-ffn-hidden-size"] == "12" and values["--ffn-hidden-size"] == "48"
    assert values["--rotary-percent"] == "0.5" and values["--moe-layer-freq"] == "'[0,1,1]'"
    assert values["--moe-router-bias-update-rate"] == "0" and "--qk-layernorm" in words
    assert any(line.startswith("--moe-router-bias-update-rate 0: the biases") for line in said)
    assert any("--moe-aux-loss-coeff" in line for line in said)


def test_flags_at_the_size_of_the_release():
    mini = {
        **models.LLADA2,
        **{"num_hidden_layers": 20, "hidden_size": 2048, "intermediate_size": 5120},
        **{"moe_intermediate_size": 512, "num_experts": 256, "num_experts_per_tok": 8},
        **{"n_group": 8, "topk_group": 4, "num_attention_heads": 16, "num_key_value_heads": 4},
        **{"head_dim": 128, "rope_theta": 600000, "max_position_embeddings": 32768},
        **{"vocab_size": 157184, "mask_token_id": None, "pad_token_id": 156892, "rotary_dim": 64},
    }
    flags = [*model_flags(LLADA2, mini), *LLADA2.training_flags]
    flags += "--padded-vocab-size 157184 --mdm-mask-token-id 156895 --mdm-block-size 32".split()
    flags += "--tokenizer-type NullTokenizer --vocab-size 157184 --bf16".split()
    args = megatron_model.arguments(flags)
    assert (args.num_experts, args.moe_router_topk, args.moe_router_bias_update_rate) == (256, 8, 0)
    assert args.moe_layer_freq == [0] + [1] * 19


@pytest.mark.parametrize("experts, groups", [(4, 4), (3, 4), (2, 4), (7, 1)])
def test_groups_that_are_all_kept_choose_nothing(experts, groups):
    changes = {"num_experts_per_tok": experts, "n_group": groups, "topk_group": groups}
    flags = [*model_flags(LLADA2, {**models.LLADA2, **changes}), "--padded-vocab-size", "96"]
    flags += "--tokenizer-type NullTokenizer --vocab-size 96".split()
    assert megatron_model.checkpoint_contents(flags).shapes  # Megatron accepts the groups
    args = megatron_model.arguments(flags)
    scores = torch.rand(50, args.num_experts, generator=torch.Generator().manual_seed(1))
    _, chosen = group_limited_topk(
        scores,
        args.moe_router_topk,
        *scores.shape,
        args.moe_router_num_groups,
        args.moe_router_group_topk,
    )
    assert torch.equal(chosen.sort().values, scores.topk(experts).indices.sort().values)


@pytest.mark.parametrize("bias", [torch.float32, torch.bfloat16])
def test_the_biases_keep_their_dtype(bias, tmp_path):
    """A release has bfloat16 weights; classes and engines hold the biases in float32."""
    source = models.make("llada2", tmp_path / "hf", torch_dtype="bfloat16")
    tensors = load_file(source / SINGLE)
    halves = {n: t.to(bias if n in biases(tensors) else torch.bfloat16) for n, t in tensors.items()}
    save_file(halves, source / SINGLE)
    to_megatron(str(source), str(tmp_path / "mg"), verify=True, **silent)
    assert "--bf16" in (tmp_path / "mg" / "launch.txt").read_text()
    key = "decoder.layers.1.mlp.router.expert_bias"
    assert DistCheckpoint(tmp_path / "mg").dtype(key) == bias
    to_hugging_face(str(tmp_path / "mg"), str(tmp_path / "back"), verify=True, **silent)
    assert same_files(source / SINGLE, tmp_path / "back" / SINGLE)
    configs = [json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "back")]
    assert configs[0] == configs[1]
    to_megatron(str(source), str(tmp_path / "mg32"), dtype=torch.float32, **silent)
    checkpoint = DistCheckpoint(tmp_path / "mg32")
    assert checkpoint.dtype(key) == bias
    assert checkpoint.dtype(key.replace("expert_bias", "weight")) == torch.float32
    to_hugging_face(str(tmp_path / "mg"), str(tmp_path / "wide"), dtype=torch.float32, **silent)
    wide = load_file(tmp_path / "wide" / SINGLE)
    assert {t.dtype for n, t in wide.items() if n not in biases(wide)} == {torch.float32}
    assert {t.dtype for t in biases(wide).values()} == {bias}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"


def test_megatron_reads_biases_of_a_low_precision_into_float32(tmp_path, megatron_logits):
    source = models.make("llada2", tmp_path / "hf")
    tensors = load_file(source / SINGLE)
    rounded = {name: tensor.bfloat16() for name, tensor in biases(tensors).items()}
    save_file({**tensors, **rounded}, source / SINGLE)
    to_megatron(str(source), str(tmp_path / "mg"), **silent)
    tokens = torch.arange(32)[None]
    wide = {name: tensor.float() for name, tensor in load_file(source / SINGLE).items()}
    expected = models.published_logits(models.LLADA2, wide, tokens)
    ours = megatron_logits(tmp_path / "mg", tokens)["full"]
    assert (ours - expected).abs().max() < TOLERANCE


def test_what_serving_reads_comes_back(tmp_path):
    source = models.make("llada2", tmp_path / "hf")
    files = {
        "generation_config.json": json.dumps({"eos_token_id": 81, "pad_token_id": 81}),
        "chat_template.jinja": "{{ messages }}",
        "modeling_llada2_moe.py": "raise RuntimeError",
        "configuration_llada2_moe.py": "raise RuntimeError",
    }
    for name, text in files.items():
        (source / name).write_text(text)
    (source / "sglang.yaml").write_text("block_size: 4\nthreshold: 0.9\n")
    to_megatron(str(source), str(tmp_path / "mg"), **silent)
    args = load_common_state_dict(str(tmp_path / "mg" / "release"))["args"]
    assert (args.mdm_block_size, args.mdm_mask_token_id, args.mdm_shift) == (32, 90, False)
    to_hugging_face(str(tmp_path / "mg"), str(tmp_path / "back"), **silent)
    for name, text in files.items():
        assert (tmp_path / "back" / name).read_text() == text
    for_sglang = (tmp_path / "back" / "sglang.yaml").read_text()
    assert for_sglang == "block_size: 32\nthreshold: 0.9\n"
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == models.LLADA2


def test_the_mask_token_of_the_class_need_not_be_in_config_json():
    config = {k: v for k, v in models.LLADA2.items() if k not in ("mask_token_id", "architectures")}
    assert detect(config) is LLADA2 and LLADA2.mask_token_id == 156895
