"""Models that fill in blocks: their block size goes both ways, and logits are those of blocks."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import load_common_state_dict
from safetensors.torch import load_file

from megatron_mdm.conversion import to_hugging_face as to_hugging_face_module
from megatron_mdm.conversion.common import write_hub_files
from megatron_mdm.conversion.families import detect
from megatron_mdm.conversion.family import block_size, shift_first
from megatron_mdm.conversion.safetensors_model import SINGLE
from megatron_mdm.conversion.to_hugging_face import block_entry, to_hugging_face, write_sglang_file
from megatron_mdm.conversion.to_megatron import to_megatron
from megatron_mdm.conversion.vocabulary import Vocabulary
from megatron_mdm.errors import UserError
from tests import ranks
from tests.conversion import models
from tests.conversion.test_moved import SPECIAL, WORDS, write_data
from tests.conversion.test_round_trip import TOLERANCE, with_args
from tests.ranks import entries

MASK = 90
FLAGS = {
    "sdar": "--mdm-block-size 4",
    "fast-dllm": "--mdm-shift --mdm-block-size 8 --mdm-shift-first noisy",
    "llada2": "--mdm-block-size 32",
}
# What a checkpoint records: block size, shift, and what predicts first tokens in training.
RECORDED = {
    "sdar": (4, False, "clean"),
    "fast-dllm": (8, True, "noisy"),
    "llada2": (32, False, "clean"),
}
SHIFTED = {kind for kind, (_, shift, _) in RECORDED.items() if shift}


def checkpoint_block_logits() -> None:
    """Computes logits in blocks. request.pt holds (checkpoint, masked tokens, clean tokens)."""
    from megatron_mdm.environment import prepare_environment
    from megatron_mdm.mcore.device import training_device
    from megatron_mdm.mcore.inference.loaded_model import loaded_model

    directory = Path(os.environ["TRACE_DIR"])
    checkpoint, tokens, clean = torch.load(directory / "request.pt")
    sys.argv = sys.argv[:1]
    prepare_environment("cpu")
    found = {}
    with training_device("cpu"), loaded_model(checkpoint, "cpu", block_size="trained") as loaded:
        found["size"] = loaded.block_size
        found["logits"] = loaded.logits(tokens, clean, torch.zeros_like(clean))
    torch.save(found, directory / "logits.pt")


@pytest.mark.parametrize("kind", models.IN_BLOCKS)
def test_logits_are_those_of_a_pass_for_each_block(kind, converted, tmp_path):
    source, checkpoint, _ = converted(kind)
    size = RECORDED[kind][0]
    generator = torch.Generator().manual_seed(1)
    # The last block is not whole.
    clean = torch.randint(0, 80, (2, 2 * size + size // 2), generator=generator)
    is_masked = torch.rand(clean.shape, generator=generator) < 0.6
    is_masked[:, 0] = False  # a shifted model does not predict the first token
    is_masked[:, size] = True
    tokens = clean.masked_fill(is_masked, MASK)
    torch.save((str(checkpoint), tokens, clean), tmp_path / "request.pt")
    ranks.launch(tmp_path, 1, entry=checkpoint_block_logits)
    found = torch.load(tmp_path / "logits.pt")
    expected, whole = (
        models.block_logits(source, tokens, clean, n, kind in SHIFTED) for n in (size, 99)
    )
    assert found["size"] == size
    assert expected.abs().max() > 1, "too small to show a difference"
    assert (found["logits"] - expected)[is_masked].abs().max() < TOLERANCE
    assert (whole - expected)[is_masked].abs().max() > 0.1


@pytest.mark.parametrize("kind", models.IN_BLOCKS)
def test_a_checkpoint_and_its_launch_line_say_the_blocks(kind, converted):
    _, checkpoint, said = converted(kind)
    launch = " ".join((checkpoint / "launch.txt").read_text().replace("\\\n", "").split())
    assert FLAGS[kind] in launch
    assert ("--mdm-shift" in launch) == (
        kind in SHIFTED
    ) and f"--mdm-mask-token-id {MASK}" in launch
    args = load_common_state_dict(str(checkpoint / "release"))["args"]
    assert (args.mdm_block_size, args.mdm_shift, args.mdm_shift_first) == RECORDED[kind]
    assert args.mdm_mask_token_id == MASK
    assert any("fills in blocks of" in line for line in said)
    assert any(line.startswith("verified: logits") for line in said) == (kind != "llada2")


def test_tools_treat_a_converted_checkpoint_as_trained_in_its_blocks(converted, tmp_path):
    """The number of finished iterations is 0."""
    _, checkpoint, _ = converted("sdar")
    words = ["--load", str(checkpoint), "--device", "cpu", "--output", str(tmp_path / "x.json")]
    run = ranks.run_forked("tools/fit_ppots.py", *words)
    assert run.returncode != 0
    assert f"{checkpoint} was trained in blocks of 4 tokens" in run.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function from a kind to a model that its launch line trained on in blocks of 16, cached."""
    made = {}

    def train(kind):
        if kind in made:
            return made[kind]
        root = made[kind] = tmp_path_factory.mktemp(kind)
        source = models.make(kind, root / "hf")
        models.write_tokenizer(source, WORDS, **SPECIAL)
        to_megatron(str(source), str(root / "mg"), log=str)
        write_data(root)
        line = (root / "mg" / "launch.txt").read_text().replace("\\\n", "")
        line = line.replace("MY_RUN", str(root / "run")).replace("MY_DATA", str(root / "text"))
        words = shlex.split(line)
        flags = words[words.index("megatron_mdm.pretrain") + 1 :]
        flags += "--mdm-device cpu --num-workers 0 --exit-interval 2 --global-batch-size 2".split()
        flags += ["--data-cache-path", str(root / "cache"), "--mdm-block-size", "16"]
        flags += ["--seq-length", "64"]  # the data are short
        ranks.launch(root / "log", 1, "--", *flags, entry=entries.only_these_flags)
        return root

    return train


def test_evaluate_reads_the_blocks_of_a_converted_checkpoint(trained, tmp_path):
    root = trained("sdar")
    words = ["--load", str(root / "mg"), "--data", str(root / "text.jsonl"), "--device", "cpu"]
    words += ["--rows", "4", "--draws", "2"]
    results = []
    for size in ("trained", "4"):
        path = tmp_path / f"{size}.json"
        run = ranks.run_forked(
            "tools/evaluate.py", *words, "--block-size", size, "--json", str(path)
        )
        assert run.returncode == 0, run.stderr[-2000:]
        results.append(json.loads(path.read_text()))
    assert results[0] == results[1] and results[0]["block_size"] == 4


@pytest.mark.parametrize(
    "kind, key",
    [("sdar", "block_size"), ("fast-dllm", "bd_size"), ("llada2", "mdm_block_size")],
)
def test_the_way_back_writes_the_block_size_of_the_run(kind, key, trained, tmp_path):
    root, said = trained(kind), []
    to_hugging_face(str(root / "run"), str(tmp_path / "back"), verify=True, log=said.append)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == {**models.IN_BLOCKS[kind][0], key: 16}
    assert any(f"trained in blocks of 16 tokens ({key} in config.json)" in line for line in said)
    for_sglang = tmp_path / "back" / "sglang.yaml"
    assert for_sglang.exists() == (kind != "fast-dllm")
    assert kind == "fast-dllm" or for_sglang.read_text() == "block_size: 16\n"
    assert any(str(for_sglang) in line for line in said) == for_sglang.exists()
    before, after = (load_file(d / SINGLE) for d in (root / "hf", tmp_path / "back"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    biases = [name for name in before if name.endswith("expert_bias")]
    assert all(torch.equal(before[name], after[name]) for name in biases)
    assert len(biases) == (2 if kind == "llada2" else 0)


def test_a_run_in_blocks_of_another_family(trained, tmp_path):
    """A model of Qwen3's layout becomes one of SDAR, or stays one whose config.json says blocks."""
    own = {key: value for key, value in models.SDAR.items() if key != "block_size"}
    qwen = {**own, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    for name, config in (("sdar", models.SDAR), ("qwen", qwen)):
        directory = tmp_path / name
        models.write_tokenizer(directory, WORDS, **SPECIAL)
        (directory / "config.json").write_text(json.dumps(config))
    run, as_qwen = str(trained("sdar") / "run"), str(tmp_path / "as_qwen")
    to_hugging_face(run, as_qwen, config_from=str(tmp_path / "qwen"), log=str)
    config = json.loads(Path(as_qwen, "config.json").read_text())
    assert config == {**qwen, "mdm_block_size": 16, "mdm_shift": False}
    assert block_size(detect(config), config) == 16
    to_megatron(as_qwen, str(tmp_path / "mg"), log=str)
    assert "--mdm-block-size 16" in (tmp_path / "mg" / "launch.txt").read_text()
    as_sdar = tmp_path / "as_sdar"
    to_hugging_face(str(tmp_path / "mg"), str(as_sdar), config_from=str(tmp_path / "sdar"), log=str)
    assert json.loads((as_sdar / "config.json").read_text()) == {**models.SDAR, "block_size": 16}
    one, other = load_file(Path(as_qwen, SINGLE)), load_file(as_sdar / SINGLE)
    assert one.keys() == other.keys() and all(torch.equal(one[x], other[x]) for x in one)


@pytest.mark.parametrize("first, entry", [("noisy", {}), ("clean", {"mdm_shift_first": "clean"})])
def test_what_predicts_first_tokens_goes_both_ways(first, entry, converted, tmp_path, monkeypatch):
    _, checkpoint, _ = converted("fast-dllm")
    monkeypatch.setattr(to_hugging_face_module, "DistCheckpoint", with_args(mdm_shift_first=first))
    to_hugging_face(str(checkpoint), str(tmp_path / "back"), log=str)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == {**models.FAST_DLLM, **entry}
    to_megatron(str(tmp_path / "back"), str(tmp_path / "mg"), log=str)
    args = load_common_state_dict(str(tmp_path / "mg" / "release"))["args"]
    assert args.mdm_shift_first == first
    launch = (tmp_path / "mg" / "launch.txt").read_text()
    assert ("--mdm-shift-first noisy" in launch) == (first == "noisy")


def test_where_a_clean_or_noisy_token_predicts_first_tokens():
    qwen = {**models.SMALL, "architectures": ["Qwen2ForCausalLM"]}
    for config, shift, blocks, first in (
        (models.FAST_DLLM, True, 8, "noisy"),
        ({**models.FAST_DLLM, "mdm_shift_first": "clean"}, True, 8, "clean"),
        (qwen, True, 8, "clean"),
        ({**qwen, "mdm_shift_first": "noisy"}, True, 8, "noisy"),
        ({**qwen, "mdm_shift_first": "noisy"}, False, 8, "clean"),
        ({**qwen, "mdm_shift_first": "noisy"}, True, None, "clean"),
    ):
        assert shift_first(detect(config), config, shift, blocks) == first


def test_a_block_size_has_to_be_known():
    config = {key: value for key, value in models.SDAR.items() if key != "block_size"}
    with pytest.raises(UserError, match="has no 'block_size', the number of tokens in a block"):
        block_size(detect(config), config)
    with pytest.raises(UserError, match="'block_size' should be a whole number above 0, got '4'"):
        detect({**config, "block_size": "4"})


def test_the_size_of_fast_dllm_is_that_of_its_class_if_config_json_has_none():
    config = {key: value for key, value in models.FAST_DLLM.items() if key != "bd_size"}
    family = detect(config)
    assert block_size(family, config) == 32 and block_entry(family, config, 32) == {}
    assert block_entry(family, config, 16) == {"bd_size": 16}


def test_the_size_of_llada2_is_32_unless_a_way_back_wrote_another():
    family = detect(models.LLADA2)
    assert block_size(family, models.LLADA2) == 32
    assert block_entry(family, models.LLADA2, 32) == {}
    assert block_entry(family, models.LLADA2, 16) == {"mdm_block_size": 16}
    trained = {**models.LLADA2, "mdm_block_size": 16}
    assert block_size(family, trained) == 16
    assert block_entry(family, trained, 32) == {"mdm_block_size": 32}


def test_what_config_json_says_of_blocks_in_the_end():
    qwen = {**models.SMALL, "architectures": ["Qwen3ForCausalLM"]}
    for config, size, entry in (
        (models.SDAR, 4, {}),
        (models.SDAR, 16, {"block_size": 16}),
        (models.SDAR, None, {}),  # whole rows: there is no value for them
        (qwen, None, {}),
        (qwen, 16, {"mdm_block_size": 16}),
        ({**qwen, "mdm_block_size": 16}, 16, {}),
        ({**qwen, "mdm_block_size": 16}, None, {"mdm_block_size": None}),
    ):
        assert block_entry(detect(config), config, size) == entry


@pytest.mark.parametrize(
    "before, after",
    [
        (None, b"block_size: 16\n"),
        (b"", b"block_size: 16\n"),
        (b"threshold: 0.9\n", b"block_size: 16\nthreshold: 0.9\n"),
        (b"a: 1\nblock_size : 4 # mine\nb: 2", b"a: 1\nblock_size: 16 # mine\nb: 2"),
        (b"block_size:\nmy_block_size: \xff\r\n", b"block_size: 16\nmy_block_size: \xff\r\n"),
    ],
)
def test_sglang_keeps_the_lines_of_its_file(before, after, tmp_path):
    path = tmp_path / "sglang.yaml"
    if before is not None:
        path.write_bytes(before)
    write_sglang_file(path, 16)
    assert path.read_bytes() == after


def test_config_json_does_not_get_a_mask_token_that_the_class_knows(tmp_path):
    config = {key: value for key, value in models.SDAR.items() if key != "mask_token_id"}
    (tmp_path / "hf").mkdir()
    for mask, written in ((151669, config), (MASK, {**config, "mask_token_id": MASK})):
        vocab = Vocabulary(151936, 151936, 151936, mask)
        write_hub_files(tmp_path / "hf", tmp_path / str(mask), detect(config), config, vocab)
        assert json.loads((tmp_path / str(mask) / "config.json").read_text()) == written
