"""--verify compares the logits of both models, and says why if it cannot."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mdm.conversion import logits
from megatron_mdm.conversion.to_hugging_face import to_hugging_face
from megatron_mdm.conversion.to_megatron import to_megatron
from megatron_mdm.errors import UserError
from tests.conversion import models
from tests.conversion.test_bad_input import TOOL

CODE = Path(__file__).with_name("modeling_tiny.py")
AUTO = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """The directory to which transformers copies modeling code."""
    return tmp_path_factory.mktemp("modules")


@pytest.fixture
def ran(tmp_path, monkeypatch, modules):
    """A file that exists once modeling code has run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setenv("MODELING_CODE_RAN", str(tmp_path / "ran"))
    return tmp_path / "ran"


def with_code(kind, directory, **changes):
    source = models.make(kind, directory, auto_map=AUTO, **changes)
    # Different code for each model, so that transformers has not imported it yet.
    (source / CODE.name).write_text(CODE.read_text() + f"# {directory}\n")
    return source


def about_logits(said):
    starts = "verified: logits of", "did not compare logits"
    (line,) = [line for line in said if line.startswith(starts)]
    return line


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen2", "llama3.1"])
def test_classes_of_transformers(kind, dtype, tmp_path):
    """The mask token is in an unused row of the vocabulary, as in some released models."""
    source, there, back = models.make(kind, tmp_path / "hf"), [], []
    models.write_tokenizer(source, {f"w{i}": i for i in range(89)} | {"<unk>": 89})
    settings = {"verify": True, "dtype": dtype}
    to_megatron(
        str(source), str(tmp_path / "mg"), add_mask=True, multiple=8, log=there.append, **settings
    )
    to_hugging_face(str(tmp_path / "mg"), str(tmp_path / "back"), log=back.append, **settings)
    for said in (there, back):
        line = about_logits(said)
        difference, largest = re.search(r"difference (\S+) of logits up to (\S+) ", line).groups()
        assert line.startswith("verified") and "float32" in line and "tolerance 1e-04" in line
        assert float(difference) < 1e-4 and float(largest) > 1


@pytest.mark.parametrize("kind", ["llada", "llada-moe", "llada2", "dream"])
def test_modeling_code_of_the_directory(kind, ran, tmp_path):
    source, said = with_code(kind, tmp_path / "hf"), []
    to_megatron(str(source), str(tmp_path / "no"), verify=True, log=said.append)
    assert about_logits(said).endswith(
        "--trust-remote-code to run modeling_tiny.py beside its config.json"
    )
    assert not ran.exists()
    for convert, given, output in (
        (to_megatron, source, tmp_path / "mg"),
        (to_hugging_face, tmp_path / "mg", tmp_path / "back"),
    ):
        said.clear()
        convert(str(given), str(output), verify=True, trust=True, log=said.append)
        assert about_logits(said).startswith("verified: logits of 2 rows of 16")
    assert ran.exists()


def test_a_model_whose_files_have_its_output_layer_once(ran, tmp_path):
    source, said = with_code("llada", tmp_path / "hf", weight_tying=True), []
    tensors = load_file(source / "model.safetensors")
    del tensors["model.transformer.ff_out.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    to_megatron(str(source), str(tmp_path / "mg"), verify=True, trust=True, log=said.append)
    assert about_logits(said).startswith("verified: logits of 2 rows of 16")


def test_code_that_has_more_tensors_than_the_files(ran, tmp_path):
    """The code would compute with random numbers for the missing tensors."""
    source, said = with_code("dream", tmp_path / "hf"), []
    path = source / "modeling_tiny.py"
    path.write_text(
        path.read_text().replace(
            "    def forward", "        self.more = torch.nn.Linear(1, 1)\n\n    def forward"
        )
    )
    to_megatron(str(source), str(tmp_path / "mg"), verify=True, trust=True, log=said.append)
    assert "ValueError: it has the tensor more.bias, which the files lack" in about_logits(said)


def test_a_model_that_computes_something_else_is_not_kept(ran, tmp_path):
    source = with_code("llada-moe", tmp_path / "hf")
    path = source / "modeling_tiny.py"
    path.write_text(path.read_text().replace("input_ids))", "input_ids) * 1.001)"))
    with pytest.raises(UserError, match="--verify: logits of .* the models differ, nothing was"):
        to_megatron(str(source), str(tmp_path / "mg"), verify=True, trust=True)
    assert ran.exists() and not (tmp_path / "mg").exists()


def test_why_logits_were_not_compared(ran, tmp_path, monkeypatch):
    plain = models.make("llada", tmp_path / "plain")
    broken = with_code("llada", tmp_path / "broken")
    (broken / "modeling_tiny.py").write_text("raise RuntimeError('too old')\n")
    remote = models.make("llada", tmp_path / "remote", auto_map={"AutoModel": "a/b--modeling.C"})
    large = with_code("llada", tmp_path / "large")
    for source, limit, why in (
        (plain, 10**9, "transformers has no class for llada, and no modeling code lies beside"),
        (remote, 10**9, "transformers has no class for llada, and no modeling code lies beside"),
        (broken, 10**9, "Hugging Face's class does not load: RuntimeError: too old"),
        (large, 10**4, "the weights take 0.0 GB in float32, more than 0 GB"),
    ):
        monkeypatch.setattr(logits, "MAX_BYTES", limit)
        said = []
        to_megatron(str(source), f"{source}-mg", verify=True, trust=True, log=said.append)
        assert f"did not compare logits: {why}" in about_logits(said)
        advice = "in an environment of its own, pip install 'transformers==4.57.1')"
        assert about_logits(said).endswith(advice) == (source == broken)
    assert not ran.exists()


def test_trust_goes_with_verify():
    """This is checked on the way back only. On the way there, trust is also for the tokenizer."""
    argv = "--to", "huggingface", "--input", "a", "--output", "b", "--trust-remote-code"
    run = subprocess.run([sys.executable, str(TOOL), *argv], capture_output=True, text=True)
    assert (
        run.stderr.startswith("error: --trust-remote-code is for --verify") and run.returncode == 2
    )
