"""Bad input gives one clear line, writes nothing, and leaves existing files untouched."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mdm.conversion import common, safetensors_model
from megatron_mdm.conversion.safetensors_model import INDEX, SINGLE
from megatron_mdm.conversion.to_hugging_face import to_hugging_face
from megatron_mdm.conversion.to_megatron import to_megatron
from megatron_mdm.errors import UserError
from tests import ROOT
from tests.conversion import models

TOOL = ROOT / "tools" / "convert_checkpoint.py"


@pytest.fixture
def source(tmp_path):
    return models.make("llada", tmp_path / "hf")


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(directory, **changes):
    tensors = {**load_file(directory / SINGLE), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / SINGLE)


def cut(path, keep=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def not_finite(directory, tensor, value):
    """Puts a value at the start of a tensor in the files of a checkpoint."""
    path = directory / "release" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    place = data.find(tensor.numpy().tobytes())
    assert place > 0
    data[place : place + 4] = torch.tensor(value).numpy().tobytes()
    path.write_bytes(data)
    (path.parent / "integrity.json").unlink()  # a run that diverged would have matching sums


def index(directory):
    weights = {name: SINGLE for name in load_file(directory / SINGLE)}
    weights["more"] = "model-2.safetensors"
    (directory / INDEX).write_text(json.dumps({"weight_map": weights}))


Q = "model.transformer.blocks.1.q_proj.weight"
NORM = "model.transformer.ln_f.weight"
CASES = {
    "a missing shard": (index, "model-2.safetensors"),
    "a shard cut short": (lambda d: cut(d / SINGLE), "model.safetensors is cut short"),
    "an empty shard": (lambda d: cut(d / SINGLE, 0), "model.safetensors is cut short"),
    "no shard": (lambda d: (d / SINGLE).unlink(), "no *.safetensors files"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: No such file"),
    "a broken config": (lambda d: cut(d / "config.json"), "config.json is not valid JSON"),
    "another family": (
        lambda d: change_config(d, architectures=["MoEModelLM"]),
        "config.json: MoEModelLM is not a supported architecture",
    ),
    "an unknown computation": (
        lambda d: change_config(d, scale_logits=True),
        "scale_logits = True is not supported for llada",
    ),
    "a missing size": (lambda d: change_config(d, d_model=None), "no 'd_model'"),
    "sizes that do not fit": (
        lambda d: change_config(d, mlp_hidden_size=64),
        "has shape [48, 32], config.json implies [64, 32]",
    ),
    "a missing tensor": (lambda d: change_tensors(d, **{Q: None}), f"lacks the tensor {Q}"),
    "an unknown tensor": (
        lambda d: change_tensors(d, **{"q_norm.weight": torch.ones(3)}),
        "has the tensor q_norm.weight, which the family llada has no place for",
    ),
    "mixed dtypes": (
        lambda d: change_tensors(d, **{Q: torch.zeros(32, 32).bfloat16()}),
        "choose one with --dtype",
    ),
    "a quantized tensor": (
        lambda d: change_tensors(d, **{Q: torch.zeros(32, 32, dtype=torch.int8)}),
        f"the tensor {Q} has dtype I8",
    ),
    "an index that is a list": (lambda d: (d / INDEX).write_text("[]"), "JSON object"),
    "an index without files": (lambda d: (d / INDEX).write_text("{}"), "no 'weight_map' of"),
    "a tensor twice": (
        lambda d: save_file({Q: torch.zeros(32, 32)}, d / "more.safetensors"),
        f"has the tensor {Q} twice, in model.safetensors and more.safetensors",
    ),
    "a value of another kind": (
        lambda d: change_config(d, mask_token_id="<mask>"),
        "'mask_token_id' should be the id of a token, got '<mask>'",
    ),
    "no heads": (lambda d: change_config(d, n_heads=0), "'n_heads' should be a whole number above"),
    "a damaged tokenizer": (
        lambda d: (d / "tokenizer.json").write_text("[1]"),
        "tokenizer.json does not hold a JSON object",
    ),
    "an adapter": (
        lambda d: (d / "adapter_config.json").write_text("{}"),
        "hf/adapter_config.json: an adapter (LoRA) lies beside the model, and its weights would be",
    ),
    "weights of an adapter": (
        lambda d: save_file({"lora_A": torch.ones(3)}, d / "adapter_model.safetensors"),
        "hf/adapter_model.safetensors: an adapter (LoRA) lies beside the model",
    ),
    "a quantization": (
        lambda d: change_config(d, quantization_config={"quant_method": "gptq"}),
        "quantization_config = {'quant_method': 'gptq'} is not supported for llada",
    ),
    "weights elsewhere": (
        lambda d: change_config(d, transformers_weights="other.safetensors"),
        "transformers_weights = 'other.safetensors' is not supported",
    ),
    "a model beside that of the index": (
        lambda d: (
            save_file(load_file(d / SINGLE), d / "a.safetensors"),
            (d / INDEX).write_text('{"weight_map": {"x": "a.safetensors"}}'),
        ),
        "has model.safetensors, which model.safetensors.index.json does not name",
    ),
    "NaN": (
        lambda d: change_tensors(d, **{Q: torch.full((32, 32), torch.nan)}),
        f"the tensor {Q} holds nan: the training has diverged",
    ),
    "minus infinity": (
        lambda d: change_tensors(d, **{Q: -torch.inf * torch.ones(32, 32)}),
        f"the tensor {Q} holds -inf: the training has diverged",
    ),
    "a mask outside": (lambda d: change_config(d, mask_token_id=96), "mask token 96 lies outside"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_model_is_named_and_nothing_is_written(case, source, tmp_path):
    damage, message = CASES[case]
    damage(source)
    with pytest.raises(UserError) as caught:
        to_megatron(str(source), str(tmp_path / "out"))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_file_beside_the_weights_that_cannot_be_read(source, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_model, "side_files", lambda directory: [directory / "gone.txt"])
    with pytest.raises(UserError, match="cannot read .*/hf/gone.txt: No such file"):
        to_megatron(str(source), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tensor_comes_from_the_file_that_the_index_names(source):
    tensors = load_file(source / SINGLE)
    save_file({**tensors, Q: torch.full((32, 32), 7.0)}, source / "a.safetensors")
    save_file({Q: tensors[Q]}, source / "z.safetensors")
    (source / SINGLE).unlink()
    files = dict.fromkeys(tensors, "a.safetensors") | {Q: "z.safetensors"}
    (source / INDEX).write_text(json.dumps({"weight_map": files}))
    model = safetensors_model.HubModel(source)
    assert torch.equal(model.read(Q), tensors[Q]) and model.entries.keys() == tensors.keys()


def test_numbers_that_the_dtype_cannot_hold(source, tmp_path):
    tensor = torch.zeros(32, 32)
    tensor[3, 3] = 1e5
    change_tensors(source, **{Q: tensor})
    for dtype in (torch.bfloat16, None):
        to_megatron(str(source), str(tmp_path / str(dtype)), dtype=dtype, verify=True, log=str)
    for convert, given in ((to_megatron, source), (to_hugging_face, tmp_path / "None")):
        with pytest.raises(UserError, match=f"--dtype: {Q} holds 1e.05, which is infinite in torc"):
            convert(str(given), str(tmp_path / "out"), dtype=torch.float16)
        assert not (tmp_path / "out").exists()


def test_the_disk_needs_room_for_what_is_written(source, tmp_path, monkeypatch):
    """The output takes half of a float32 input in bfloat16, twice a bfloat16 input in float32."""
    size = (source / SINGLE).stat().st_size

    def convert(given, output, dtype, free):
        usage = namedtuple("usage", "total used free")(0, 0, free)
        with monkeypatch.context() as patch:
            patch.setattr(common.shutil, "disk_usage", lambda _: usage)
            to_megatron(str(given), str(tmp_path / output), dtype=dtype, log=str)

    convert(source, "half", torch.bfloat16, size * 3 // 4)
    with pytest.raises(UserError, match=" kB are needed beside ") as caught:
        convert(source, "out", None, size * 3 // 4)
    needed, free, missing = map(float, re.findall(r"([\d.]+) kB", str(caught.value)))
    assert needed > free > missing == pytest.approx(needed - free, abs=1)
    to_hugging_face(str(tmp_path / "half"), str(tmp_path / "small"), log=str)
    with pytest.raises(UserError, match="kB are needed beside"):
        convert(tmp_path / "small", "out", torch.float32, size * 3 // 4)
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for convert in (to_megatron, to_hugging_face):
        with pytest.raises(UserError, match="exists already"):
            convert(str(source), str(tmp_path / "out"))
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out"}


def damage_largest(checkpoint):
    cut(checkpoint / "release" / "__0_0.distcp")


BACK = {
    "no checkpoint": (
        lambda c: (c / "latest_checkpointed_iteration.txt").unlink(),
        "has no latest_checkpointed_iteration.txt: the newest complete checkpoint is release",
    ),
    "a missing file": (lambda c: (c / "release" / "__0_0.distcp").unlink(), "__0_0.distcp"),
    "a file cut short": (damage_largest, "has a __0_0.distcp that is cut short"),
    "no metadata": (lambda c: (c / "release" / ".metadata").unlink(), "release"),
    "another model": (
        lambda c: change_config(c / "huggingface", rms_norm_eps=1e-6),
        "--norm-epsilon is 1e-05 in the checkpoint and 1e-06 in config.json",
    ),
    "another family": (
        lambda c: shutil.copy(c / "release" / "metadata.json", c / "huggingface" / "config.json"),
        "config.json: None is not a supported architecture",
    ),
    "another mask token": (
        lambda c: change_config(c / "huggingface", mask_token_id=89),
        "was trained with mask token 90,",
    ),
    "a mask token without a row": (
        lambda c: change_config(
            c / "huggingface", mask_token_id=None, vocab_size=90, embedding_size=90
        ),
        "mask token 90 lies outside the 90 rows of",
    ),
    "a larger vocabulary": (
        lambda c: change_config(c / "huggingface", vocab_size=99, embedding_size=99),
        "has 99 tokens, the checkpoint 96",
    ),
    "no config": (lambda c: shutil.rmtree(c / "huggingface"), "--hf-config"),
    "an adapter": (
        lambda c: (c / "huggingface" / "adapter_config.json").write_text("{}"),
        "huggingface/adapter_config.json: an adapter (LoRA) lies beside the model",
    ),
    "NaN": (
        lambda c: not_finite(c, load_file(c.parent / "model")[NORM], torch.nan),
        f"the tensor {NORM} holds nan: the training has diverged",
    ),
}


@pytest.mark.parametrize("case", BACK)
def test_a_bad_checkpoint_is_named_and_nothing_is_written(case, converted, tmp_path):
    source, checkpoint, _ = converted("llada")
    shutil.copytree(checkpoint, tmp_path / "mg")
    shutil.copy(source / SINGLE, tmp_path / "model")
    damage, message = BACK[case]
    damage(tmp_path / "mg")
    (tmp_path / "model").unlink()
    with pytest.raises(UserError) as caught:
        to_hugging_face(str(tmp_path / "mg"), str(tmp_path / "out"))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["mg"]


def test_verify_sees_a_flipped_bit(source, tmp_path, monkeypatch):
    from megatron_mdm.conversion import torch_dist

    write = torch_dist.write

    def write_and_flip(directory, *rest):
        write(directory, *rest)
        path = directory / "release" / "__0_0.distcp"
        data = bytearray(path.read_bytes())
        tensor = load_file(source / SINGLE)["model.transformer.ff_out.weight"]
        place = data.find(tensor.numpy().tobytes())
        assert place > 0
        data[place] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(torch_dist, "write", write_and_flip)
    # The container's checksum may find the damage before the comparison does.
    with pytest.raises(UserError, match="--verify: .*ff_out.weight|is damaged"):
        to_megatron(str(source), str(tmp_path / "out"), verify=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["megatron", "huggingface"])
def test_a_full_disk(to, source, converted, tmp_path):
    """Runs the tool in a process that may not write files of more than 20 kB."""
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    given = source if to == "megatron" else converted("llada")[1]
    argv = [str(TOOL), "--to", to, "--input", str(given), "--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 2, run.stderr
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert f"cannot write {tmp_path / 'out'}" in line
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--iteration 3", "--iteration does not go with --to megatron: leave it out"),
        ("--no-shift", "--no-shift is for --add-mask-token: add it, or leave this out"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    run = subprocess.run(
        [sys.executable, str(TOOL), *f"--to megatron --input a --output b {flags}".split()],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr == f"error: {message}\n"
