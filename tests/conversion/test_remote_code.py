"""Python code in a model's directory runs only with --trust-remote-code."""

import json
import os
import subprocess
import sys

import pytest

from megatron_mdm.conversion.to_megatron import to_megatron
from megatron_mdm.conversion.tokenizer import code_of
from megatron_mdm.data.load_tokenizer import load_hugging_face
from megatron_mdm.errors import UserError
from tests import ROOT
from tests.conversion import models

CODE = """
import os
open(os.environ["RAN"], "a").write("ran")
from transformers import PreTrainedTokenizerFast
class T(PreTrainedTokenizerFast): pass
"""
WORDS = {f"w{i}": i for i in range(80)} | {"<unk>": 80, "end": 81, "<|mdm_mask|>": 90}


@pytest.fixture
def source(tmp_path):
    """A model whose tokenizer is a class in a Python file beside it."""
    directory = models.make("llada", tmp_path / "hf")
    models.write_tokenizer(directory, WORDS, eos_token="end", mask_token="<|mdm_mask|>")
    name_code(directory, "code.T")
    (directory / "code.py").write_text(CODE)
    return directory


def name_code(directory, name):
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings |= {"auto_map": {"AutoTokenizer": [name, name]}, "tokenizer_class": "T"}
    path.write_text(json.dumps(settings))


def generate(checkpoint, tmp_path, *flags):
    """Runs the tool: (result, whether code of the directory ran)."""
    ran = tmp_path / "ran"
    ran.unlink(missing_ok=True)
    own = {"RAN": str(ran), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "tools/generate.py", "--device", "cpu", "--load", str(checkpoint)]
    command += ["--length", "3", "--prompt", "w1 w2", "--no-stop-at-eos", *flags]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **own}
    )
    return result, ran.exists()


def test_without_the_flag_tokenizer_json_takes_its_place(source, tmp_path, monkeypatch):
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    said, checkpoint = [], tmp_path / "mg"
    to_megatron(str(source), str(checkpoint), log=said.append)
    assert "the tokenizer is tokenizer.json; its Python code, code.T, was not run" in said
    assert "--trust-remote-code" not in (checkpoint / "launch.txt").read_text()
    files = checkpoint / "huggingface"
    assert code_of(files) is None and (files / "code.py").exists() and code_of(source) == "code.T"
    assert load_hugging_face(str(files)).load()("w1 w2 end") == [1, 2, 81]
    assert not (tmp_path / "ran").exists()
    result, ran = generate(checkpoint, tmp_path)
    assert result.returncode == 0 and result.stdout.startswith("w1 w2 ") and not ran


def test_a_name_of_code_does_not_forge_a_line(source, tmp_path):
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["x\nerror: fake\x1b[31m.T", None]}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    said = []
    to_megatron(str(source), str(tmp_path / "mg"), log=said.append)
    assert r"its Python code, x\nerror: fake\x1b[31m.T, was not run" in said[0]
    assert all(line.isprintable() for line in said[:-1])  # the last one is the launch line


def test_what_a_checkpoint_says_of_trust_does_not_count(source, tmp_path):
    checkpoint = tmp_path / "mg"
    to_megatron(str(source), str(checkpoint), trust=True, log=str)
    assert "--trust-remote-code" in (checkpoint / "launch.txt").read_text()
    result, ran = generate(checkpoint, tmp_path)
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
    assert "is Python code (code.T), which runs with --trust-remote-code only" in line
    assert result.returncode == 2 and "Traceback" not in result.stderr and not ran
    result, ran = generate(checkpoint, tmp_path, "--trust-remote-code")
    assert result.returncode == 0 and result.stdout.startswith("w1 w2 ") and ran
    for name, kind in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        path = checkpoint / "huggingface" / name
        code = {"auto_map": {kind: "other/repository--code.T"}}
        path.write_text(json.dumps(json.loads(path.read_text()) | code))
        result, ran = generate(checkpoint, tmp_path, "--trust-remote-code")
        line = f"{name} names Python code of another repository (other/repository--code.T)"
        assert line in result.stderr and result.returncode == 2 and not ran


def test_code_that_nothing_can_replace_is_refused(source, tmp_path):
    (source / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="the tokenizer is Python code .code.T., and has no token"):
        to_megatron(str(source), str(tmp_path / "mg"))
    assert not (tmp_path / "mg").exists()


@pytest.mark.parametrize("names", [7, [7], {"AutoTokenizer": [None, None]}, "code.T"])
def test_names_of_other_kinds(names, source):
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": names}))
    if names == 7:
        with pytest.raises(UserError, match="tokenizer_config.json is not a tokenizer's"):
            code_of(source)
    else:
        assert code_of(source) == {str: "code.T", list: "7", dict: None}[type(names)]
