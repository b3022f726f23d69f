"""Examples that continue from a Hugging Face model: real flags, resuming, a small run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mdm.conversion import megatron_model, torch_dist
from megatron_mdm.conversion.families import detect
from megatron_mdm.conversion.family import mask_token_id, model_flags
from megatron_mdm.conversion.to_megatron import launch_line, tokenizer_flags
from megatron_mdm.conversion.vocabulary import vocabulary
from megatron_mdm.sizing.flops import ModelShape
from tests import ROOT, ranks
from tests.examples.recipe import recipe

TP = 4
# Settings of the released config.json files.
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 152064,
    "eos_token_id": 151643,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
    "eos_token_id": 128001,
}
LLADA = {
    "architectures": ["LLaDAModelLM"],
    "d_model": 4096,
    "n_layers": 32,
    "mlp_hidden_size": 12288,
    "n_heads": 32,
    "n_kv_heads": 32,
    "max_sequence_length": 4096,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_theta": 500000.0,
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "weight_tying": False,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
}
# Script, environment, model, number of parameters, and rows of the vocabulary. The rows are a
# multiple of TP, with a mask token after the last row, because no tokenizer here leaves a row
# unused.
CASES = {
    "Qwen": ("ar_to_mdm.sh", {}, QWEN, 7.6e9, 152_068),
    "Llama": ("ar_to_mdm.sh", {}, LLAMA, 8.03e9, 128_260),
    "blocks": ("ar_to_block.sh", {}, QWEN, 7.6e9, 152_068),
    "continue": ("continue_llada.sh", {}, LLADA, 8.02e9, 126_464),
    "sft": ("sft.sh", {}, LLADA, 8.02e9, 126_464),
    "sft packed": ("sft.sh", {"PACK": "yes"}, LLADA, 8.02e9, 126_464),
}

# Replaces python and torchrun: it records its arguments, and writes what the steps would write.
STUB = """#!{python}
import json, pathlib, shutil, sys
words = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
with open("{here}/calls", "a") as file:
    print(json.dumps(words), file=file)
value = lambda flag: pathlib.Path(words[words.index(flag) + 1])
if "megatron" in words:
    shutil.copytree("{here}/megatron", value("--output"), dirs_exist_ok=True)
elif "huggingface" in words:
    value("--output").mkdir(exist_ok=True)
elif "--prompt" in words:
    print("a text")
elif "--output-prefix" in words:
    for end in (".bin", ".idx"):
        shutil.copy("{data}" + end, str(value("--output-prefix")) + end)
else:
    value("--save").mkdir(exist_ok=True)
    (value("--save") / "latest_checkpointed_iteration.txt").write_text("1")
"""


class Example:
    """A directory in which the scripts run, with replacements for the steps that need a GPU."""

    def __init__(self, here, data):
        self.here = here
        (here / "bin").mkdir()
        for name in ("python", "torchrun"):
            (here / "bin" / name).write_text(
                STUB.format(python=sys.executable, here=here, data=data)
            )
            (here / "bin" / name).chmod(0o755)
        (here / "megatron").mkdir()
        (here / "texts.txt").write_text("a.jsonl\n")

    def model(self, name, config):
        (self.here / name).mkdir()
        (self.here / name / "config.json").write_text(json.dumps(config))
        return str(self.here / name)

    def convert(self, config, add_mask):
        """Writes what the conversion of a model writes, without weights."""
        directory, family = self.here / "megatron", detect(config)
        mask = mask_token_id(family, config)
        words = vocabulary(config, self.here, mask, add_mask, TP)
        flags = [
            *[*model_flags(family, config), "--padded-vocab-size", str(words.padded)],
            *["--mdm-mask-token-id", str(words.mask), "--bf16"],
            *tokenizer_flags(self.here, directory, words, config),
            *(["--mdm-shift"] if add_mask else []),
        ]
        torch_dist.write(directory, [], [], megatron_model.arguments(flags), lambda size: None)
        (directory / "launch.txt").write_text(launch_line(str(directory), flags))

    def run(self, script, *arguments, **environment):
        """Runs the script: (its result, the calls that it made, in order)."""
        own = {"PATH": f"{self.here / 'bin'}:{os.environ['PATH']}", "SETUP": "no"}
        own |= {"RUNS": str(self.here / "runs"), **environment}
        result = subprocess.run(
            ["bash", str(ROOT / "examples/finetune" / script), *arguments],
            env={**os.environ, **own},
            capture_output=True,
            text=True,
        )
        calls = self.here / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return result, [json.loads(line) for line in lines]


@pytest.fixture
def example(tmp_path, data):
    return Example(tmp_path, data)


def value(words, flag):
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("case", CASES)
def test_real_flags_are_accepted_at_full_size(case, example):
    """On a node of 8 GPUs there are two replicas of the model on four GPUs each."""
    script, environment, config, parameters, rows = CASES[case]
    adds_mask = script in ("ar_to_mdm.sh", "ar_to_block.sh")
    example.convert(config, add_mask=adds_mask)
    model = example.model("model", config)
    result, calls = example.run(script, model, str(example.here / "texts.txt"), **environment)
    assert result.returncode == 0, result.stderr
    there, _, training, *_, back = calls
    assert value(there, "--pad-vocab-to-multiple-of") == str(TP)
    assert ("--add-mask-token" in there) == adds_mask
    assert training[:4] == ["torchrun", "--standalone", "--local-addr", "127.0.0.1"]
    assert training[4:6] == ["--nproc-per-node", "8"]
    assert value(back, "--input") == value(training, "--save") == value(training, "--load")
    every = int(training[len(training) - 1 - training[::-1].index("--save-interval") + 1])
    assert int(value(training, "--save-retain-interval")) % every == 0

    shutil.rmtree(value(training, "--save"))  # as before the training
    argv = training[training.index("megatron_mdm.pretrain") + 1 :]
    ranks.launch(example.here, 1, "--", *argv, "--mdm-device", "cpu", entry=recipe)
    shape = json.loads((example.here / "recipe.json").read_text())["shape"]
    assert shape["vocab_size"] == rows
    assert ModelShape(**shape).num_parameters == pytest.approx(parameters, rel=0.01)
    output = (example.here / "rank0.log").read_text()
    assert f"tensor_model_parallel_size ...................... {TP}\n" in output
    assert "data_parallel_size .............................. 2\n" in output


def test_the_same_command_goes_on_and_another_model_starts_anew(example):
    (example.here / "megatron" / "launch.txt").write_text(launch_line("x", []))
    texts, others = example.here / "texts.txt", example.here / "others.txt"
    others.write_text("b.jsonl\n")
    models = [example.model(name, {}) for name in ("one", "other")]
    first = example.run("continue_llada.sh", models[0], str(texts))[1]
    training = first[2]
    assert [call[:2] for call in first] == [
        ["python", "tools/convert_checkpoint.py"],
        ["python", "tools/preprocess_data.py"],
        ["torchrun", "--standalone"],
        ["python", "tools/convert_checkpoint.py"],
    ]
    run = Path(value(training, "--save")).parent
    assert run.parent == example.here / "runs" / "continue_llada" and run.name.startswith("one-")

    # The tools themselves decide whether existing results are those that the command asks for.
    assert all("--unless-done" in call for call in (first[0], first[1], first[3]))
    again = example.run("continue_llada.sh", models[0], str(texts))[1]
    # The input of a training that has begun is not replaced.
    assert again[0] == [word for word in first[0] if word != "--replace"]
    assert [word for word in again[1] if word != "--no-replace"] == first[1] != again[1]
    assert again[2:] == first[2:]
    assert "--replace" in first[0] and "--replace" in first[3]

    named = example.run("continue_llada.sh", models[0], str(texts), RUN="second")[1]
    assert Path(value(named[2], "--save")).parent == example.here / "runs" / "second" / run.name

    directories = {run}
    for model, text in ((models[1], texts), (models[0], others)):
        calls = example.run("continue_llada.sh", model, str(text))[1]
        assert len(calls) == 4
        directories.add(Path(value(calls[2], "--save")).parent)
    assert len(directories) == 3


def test_mistakes_end_in_one_line(example):
    model, nothing = example.model("model", {}), str(example.here / "nothing")
    for arguments, message in (
        ([nothing], f"error: {nothing} is not a Hugging Face model directory: it has no conf"),
        ([model], f"error: name a file with the paths of your texts after {model}"),
        ([model, nothing], f"error: name a file with the paths of your texts after {model}"),
    ):
        result, calls = example.run("sft.sh", *arguments)
        assert result.returncode == 2 and result.stderr.startswith(message) and not calls
        assert result.stderr.count("\n") == 1 and not (example.here / "runs").exists()


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    "script", ["sft.sh", "continue_llada.sh", "ar_to_mdm.sh", "ar_to_block.sh"]
)
def test_without_a_gpu_nothing_is_installed(script, example):
    (example.here / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (example.here / "bin" / "nvidia-smi").chmod(0o755)
    model, texts = example.model("model", {}), str(example.here / "texts.txt")
    result, calls = example.run(script, model, texts, SETUP="yes")
    assert result.returncode == 2 and not calls and not (example.here / "runs").exists()
    assert result.stderr.startswith("error: no GPU here") and "SETUP=no" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["continue_llada", "ar_to_block"])
def test_a_small_run(name, tmp_path):
    """All steps of an example, for two iterations."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **{"PYTHONPATH": str(ROOT), "SETUP": "no", "RUNS": str(tmp_path), "ITERS": "2"},
    }
    result = subprocess.run(
        ["bash", str(ROOT / f"examples/finetune/{name}.sh")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("validation NELBO") == 1
    run = tmp_path / name / "tiny"
    assert (run / "checkpoint" / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(run / "hf"))
    blocks = json.loads((run / "hf" / "config.json").read_text()).get("mdm_block_size")
    assert blocks == (1 if name == "ar_to_block" else None)
    assert ("\ndef read(" in result.stdout) == (name == "ar_to_block")
