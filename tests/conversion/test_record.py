"""A conversion is repeated if something has changed, and only then."""

import json
import os
import runpy
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mdm.conversion import record
from megatron_mdm.conversion.safetensors_model import SINGLE
from megatron_mdm.data.record import made_from
from megatron_mdm.files import set_aside
from tests import ROOT
from tests.conversion import models

TOOL = ROOT / "tools" / "convert_checkpoint.py"


@pytest.fixture
def convert(tmp_path, monkeypatch, capfd):
    """A function that runs the tool and returns the last line that it printed, errors included."""

    def run(to, source, output, *flags):
        words = ["--to", to, "--input", source, "--output", output, "--unless-done", *flags]
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, words)])
        status = None
        try:
            runpy.run_path(str(TOOL), run_name="__main__")
        except SystemExit as ended:
            status = ended.code
        assert status in (None, 2)
        out, err = capfd.readouterr()
        return (err or out).strip().splitlines()[-1]

    return run


def test_both_ways(tmp_path, convert):
    source, there, back = models.make("qwen2", tmp_path / "hf"), tmp_path / "mg", tmp_path / "back"
    done = "already made from this input and these options"

    def again(*flags):
        return convert("megatron", source, there, *flags)

    def converted(*flags):
        stamp = (there / record.RECORD).stat().st_mtime_ns if there.exists() else None
        assert done not in again(*flags) and again(*flags) == f"{there}: {done}"
        return (there / record.RECORD).stat().st_mtime_ns != stamp

    assert converted()
    assert "exists already, and no record says" in again("--pad-vocab-to-multiple-of", "3")
    assert (there / "huggingface" / "config.json").exists() and not list(tmp_path.glob("mg.*"))
    assert converted("--pad-vocab-to-multiple-of", "3", "--replace")
    assert converted("--replace")
    # Without trust, no logits were compared.
    assert "no record says" in again("--trust-remote-code")
    # A tokenizer file beside the weights counts too.
    (source / "added_tokens.json").write_text("{}")
    assert "no record says" in again() and converted("--replace")
    tensors = load_file(source / SINGLE)
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, source / SINGLE)
    assert "no record says" in again() and converted("--replace")

    assert done not in convert("huggingface", there, back)
    assert convert("huggingface", there, back) == f"{back}: {done}"
    assert "no record says" in convert("huggingface", there, back, "--dtype", "bfloat16")
    assert done not in convert("huggingface", there, back, "--dtype", "bfloat16", "--replace")
    (there / "huggingface/added_tokens.json").unlink()
    assert "no record says" in convert("huggingface", there, back, "--dtype", "bfloat16")

    # A damaged checkpoint is converted on request.
    shard = there / "release" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert "is damaged: __0_0.distcp" in convert("huggingface", there, tmp_path / "damaged")
    assert f"{tmp_path / 'damaged'}: qwen2" in convert(
        "huggingface", there, tmp_path / "damaged", "--no-checkpoint-hashes"
    )
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)

    # The output must have all its files, and --replace removes no other files.
    (back / "mine").write_text("")
    message = convert("huggingface", there, back, "--replace")
    assert "--replace: " in message and "is not as tools/convert_checkpoint.py wrote it" in message
    assert (back / "mine").exists()
    (there / "huggingface" / "config.json").unlink()
    assert "no record says" in again()
    # The launch line depends on the place.
    shutil.copytree(there, tmp_path / "copy")
    assert "no record says" in convert("megatron", source, tmp_path / "copy")
    told = json.loads((there / record.RECORD).read_text())["command"]
    assert told[:3] == ["convert_checkpoint.py", "--to", "megatron"]


def test_a_failed_conversion_leaves_what_was_to_be_replaced(tmp_path, convert):
    source, output = models.make("qwen2", tmp_path / "hf"), tmp_path / "mg"
    convert("megatron", source, output)
    before = sorted(path.name for path in output.iterdir())
    save_file({"x": torch.zeros(1)}, source / SINGLE)
    assert "lacks the tensor" in convert("megatron", source, output, "--replace")
    assert sorted(path.name for path in output.iterdir()) == before
    assert sorted(os.listdir(tmp_path)) == ["hf", "mg"]


def test_large_files_are_told_apart_by_a_part_of_each_mib(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(3 << 20))
    found = [made_from([path], {})]
    for place in (0, 1 << 19, 1 << 20, 2 << 20):
        path.write_bytes(bytes(place) + b"x" + bytes((3 << 20) - place - 1))
        found.append(made_from([path], {}))
    path.write_bytes(bytes((3 << 20) + 1))
    found.append(made_from([path], {}))
    found.append(made_from([path], {"dtype": "bfloat16"}))
    found.append(made_from([path.rename(tmp_path / "other.safetensors")], {}))
    assert len(set(found)) == len(found)


def test_a_directory_comes_back_after_a_failure(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/old").touch()
    with pytest.raises(KeyboardInterrupt), set_aside(str(tmp_path / "a")):
        assert not (tmp_path / "a").exists()
        (tmp_path / "a").mkdir()
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["old"]
    with set_aside(str(tmp_path / "a")):
        (tmp_path / "a").mkdir()
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == []
