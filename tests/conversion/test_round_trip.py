"""Hugging Face -> Megatron -> Hugging Face keeps every bit and the model's logits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mdm.conversion import safetensors_model
from megatron_mdm.conversion import to_hugging_face as to_hugging_face_module
from megatron_mdm.conversion.families import detect
from megatron_mdm.conversion.safetensors_model import INDEX, SINGLE
from megatron_mdm.conversion.to_hugging_face import to_hugging_face
from megatron_mdm.conversion.to_megatron import to_megatron
from megatron_mdm.conversion.torch_dist import DistCheckpoint
from megatron_mdm.errors import UserError
from tests.conversion import models

KINDS = [
    *["llama", "llama-mha", "llama3.1", "qwen2", "qwen2-tied", "qwen3"],
    *models.PUBLISHED,
]
TOLERANCE = 1e-4
silent = {"log": lambda line: None}


def same_files(one, other):
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name])
        for name in first
    )


def with_args(**changes):
    """The class of a checkpoint whose run had these arguments."""

    class Changed(DistCheckpoint):
        def __init__(self, *args):
            super().__init__(*args)
            vars(self.args).update(changes)

    return Changed


# HybridModel has no RoPE scaling. With Transformer Engine it has no norms of queries and keys.
HYBRID_KINDS = ["llama-mha", "qwen2-tied", "llada", "dream", "illada", "fast-dllm"]
MODELS = [
    *((kind, "gpt") for kind in dict.fromkeys([*KINDS, *models.IN_BLOCKS])),
    *((kind, "hybrid") for kind in HYBRID_KINDS),
]


@pytest.mark.parametrize("kind, model", MODELS)
def test_the_round_trip_is_bitwise(kind, model, converted, tmp_path):
    source, checkpoint, there = converted(kind, model)
    said = []
    to_hugging_face(str(checkpoint), str(tmp_path / "hf"), verify=True, log=said.append)
    assert same_files(source / SINGLE, tmp_path / "hf" / SINGLE)
    before, after = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "hf"))
    assert before == after
    has_class = detect(before).transformers_class is not None
    for lines in (there, said):
        assert any(line.startswith("verified: ") and "bitwise" in line for line in lines)
        assert any(line.startswith("verified: logits") for line in lines) == has_class


@pytest.mark.parametrize(
    "kind, model", [*((kind, "gpt") for kind in KINDS), ("qwen2-tied", "hybrid")]
)
def test_megatron_computes_the_same_logits(kind, model, converted, megatron_logits):
    source, checkpoint, _ = converted(kind, model)
    tokens = torch.randint(0, models.VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    ours = megatron_logits(checkpoint, tokens)
    published = kind in models.PUBLISHED
    for attention in ("full",) if published else ("full", "causal"):
        reference = models.logits(source, tokens, causal=attention == "causal")
        if kind == "dream":  # its decoder reads a token's logits one position before it
            reference = torch.cat([reference[:, :1], reference[:, :-1]], dim=1)
        assert reference.abs().max() > 1, "too small to show a difference"
        assert (ours[attention] - reference).abs().max() < TOLERANCE
    assert (ours["full"] - ours["causal"]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["qwen3", "llada-moe-dense"])
def test_two_tensor_parallel_ranks_compute_the_same_logits(kind, converted, megatron_logits):
    source, checkpoint, _ = converted(kind)
    tokens = torch.arange(32)[None]
    ours = megatron_logits(checkpoint, tokens, 2)["full"]
    assert (ours - models.logits(source, tokens, causal=False)).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "kind, message",
    [
        ("llama3.1", "--use-rope-scaling does not reach HybridModel, because Megatron passes no"),
        ("qwen3", "--qk-layernorm does not reach HybridModel's layers of Transformer Engine"),
    ],
)
def test_models_that_hybrid_model_lacks_a_part_for(kind, message, tmp_path):
    source = models.make(kind, tmp_path / "hf")
    with pytest.raises(UserError, match=message):
        to_megatron(str(source), str(tmp_path / "mg"), model_class="hybrid", **silent)
    assert not (tmp_path / "mg").exists()


def test_low_precision_and_another_dtype(tmp_path):
    source = models.make("dream", tmp_path / "hf")
    halves = {k: v.bfloat16() for k, v in load_file(source / SINGLE).items()}
    save_file(halves, source / SINGLE)
    to_megatron(str(source), str(tmp_path / "mg"), verify=True, **silent)
    assert "--bf16" in (tmp_path / "mg" / "launch.txt").read_text()
    to_hugging_face(str(tmp_path / "mg"), str(tmp_path / "back"), verify=True, **silent)
    assert same_files(source / SINGLE, tmp_path / "back" / SINGLE)
    hub = tmp_path / "mg" / "huggingface" / "config.json"
    config = json.loads(hub.read_text())
    hub.write_text(json.dumps({**config, "dtype": "bfloat16"}))  # versions of transformers differ
    to_hugging_face(
        str(tmp_path / "mg"), str(tmp_path / "wide"), dtype=torch.float32, verify=True, **silent
    )
    wide = load_file(tmp_path / "wide" / SINGLE)
    assert all(torch.equal(wide[name], halves[name].float()) for name in halves)
    written = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert written == {**config, "torch_dtype": "float32", "dtype": "float32"}


def test_config_json_gets_the_positions_that_the_run_raised(converted, tmp_path, monkeypatch):
    source, checkpoint, _ = converted("llada")
    before, said = json.loads((source / "config.json").read_text()), []
    declared = before["max_sequence_length"]

    def convert(positions):
        output = str(tmp_path / str(positions))
        monkeypatch.setattr(
            to_hugging_face_module, "DistCheckpoint", with_args(max_position_embeddings=positions)
        )
        to_hugging_face(str(checkpoint), output, log=said.append)
        return json.loads(Path(output, "config.json").read_text())

    assert convert(declared - 1) == before
    assert not any("as in the run" in line for line in said)
    assert convert(512) == {**before, "max_sequence_length": 512}
    assert f"max_sequence_length in config.json is 512, as in the run, and was {declared}" in said


def test_several_files_and_their_index(converted, tmp_path, monkeypatch):
    source, checkpoint, _ = converted("llada")
    monkeypatch.setattr(safetensors_model, "MAX_FILE_BYTES", 20_000)
    to_hugging_face(str(checkpoint), str(tmp_path / "many"), verify=True, **silent)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    merged = {k: v for f in files for k, v in load_file(tmp_path / "many" / f).items()}
    original = load_file(source / SINGLE)
    assert merged.keys() == original.keys() == index["weight_map"].keys()
    assert all(torch.equal(merged[name], original[name]) for name in original)
    to_megatron(str(tmp_path / "many"), str(tmp_path / "mg"), **silent)
    to_hugging_face(str(tmp_path / "mg"), str(tmp_path / "one"), **silent)
    index_bytes = index["metadata"]["total_size"]
    assert index_bytes == sum(tensor.nbytes for tensor in original.values())


def test_the_tables_fit_their_families(converted):
    """A wrong arrangement is far outside the tolerance, so the parity test can fail."""
    source, _, _ = converted("qwen2")
    tokens = torch.arange(32)[None]
    right = models.logits(source, tokens, causal=True)
    weights = load_file(source / SINGLE)
    other = source.parent / "swapped"
    shutil.copytree(source, other, dirs_exist_ok=True)
    for i in range(2):
        gate, up = (f"model.layers.{i}.mlp.{name}_proj.weight" for name in ("gate", "up"))
        weights[gate], weights[up] = weights[up], weights[gate]
    save_file(weights, other / SINGLE, {"format": "pt"})
    assert (models.logits(other, tokens, causal=True) - right).abs().max() > 100 * TOLERANCE


def test_no_line_trains_a_model_without_a_mask_token(converted):
    """Training would refuse such a model."""
    _, checkpoint, said = converted("qwen2")
    assert any("convert it with --add-mask-token" in line for line in said)
    assert not (checkpoint / "launch.txt").exists()
    assert "megatron_mdm.pretrain" not in "\n".join(said)


def test_what_the_megatron_side_needs_is_there(converted):
    _, checkpoint, said = converted("dream")
    launch = (checkpoint / "launch.txt").read_text()
    assert "--mdm-shift" in launch and "--mdm-mask-token-id 90" in launch
    assert launch.strip() in "\n".join(said)
    start = f"--pretrained-checkpoint {checkpoint} --load MY_RUN --save MY_RUN"
    assert start in " ".join(launch.replace("\\\n", "").split())
    from megatron.core.dist_checkpointing import load_common_state_dict

    args = load_common_state_dict(str(checkpoint / "release"))["args"]
    assert args.mdm_shift is True and args.layernorm_epsilon == 1e-6 and args.rotary_base == 5000
    assert args.padded_vocab_size == models.VOCAB
