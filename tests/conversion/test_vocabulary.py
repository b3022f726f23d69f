"""A mask token for autoregressive models, padding of the vocabulary, and the tokenizer."""

import functools
import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import load_common_state_dict
from safetensors.torch import load_file

from megatron_mdm.conversion import to_hugging_face as to_hugging_face_module
from megatron_mdm.conversion.safetensors_model import SINGLE
from megatron_mdm.conversion.to_hugging_face import to_hugging_face
from megatron_mdm.conversion.to_megatron import to_megatron
from megatron_mdm.conversion.tokenizer import MASK_TOKEN, known_mask, tokens_of
from megatron_mdm.conversion.torch_dist import DistCheckpoint, locate
from megatron_mdm.data.tokenizer import train_tokenizer
from megatron_mdm.errors import UserError
from tests.conversion import models

ROWS = ("embedding.word_embeddings.weight", "output_layer.weight")


def write_tokenizer(directory, tokens):
    words = {f"w{i}": i for i in range(tokens - 1)}
    models.write_tokenizer(directory, words | {"<unk>": tokens - 1})


def rows(checkpoint, key):
    opened = DistCheckpoint(checkpoint)
    return opened.read(locate(key, 0, opened.shapes))


@pytest.mark.parametrize("kind", ["qwen2", "qwen2-tied"])
def test_a_mask_token_enlarges_the_vocabulary(kind, tmp_path):
    source, said = models.make(kind, tmp_path / "hf"), []
    to_megatron(
        str(source),
        str(tmp_path / "mg"),
        add_mask=True,
        multiple=8,
        verify=True,
        log=said.append,
    )
    original = load_file(source / SINGLE)
    names = ["model.embed_tokens.weight"] + ["lm_head.weight"] * (kind == "qwen2")
    for key, name in zip(ROWS, names, strict=False):
        got = rows(tmp_path / "mg", key)
        assert got.shape[0] == 104
        assert torch.equal(got[:96], original[name])
        torch.testing.assert_close(got[96], original[name].mean(dim=0), rtol=0, atol=1e-7)
        assert not got[97:].any()
    text = "\n".join(said)
    assert "id 96" in text and "enlarges the vocabulary to 97" in text and "mean" in text
    assert "padded the vocabulary from 97 to 104" in text and "--mdm-mask-token-id 96" in text

    to_hugging_face(str(tmp_path / "mg"), str(tmp_path / "back"), verify=True, log=said.append)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["vocab_size"] == 97 and config["mask_token_id"] == 96
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    back = load_file(tmp_path / "back" / SINGLE)
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(back[name][:96] if name in names else back[name], tensor)
    assert "left out 7 padding rows" in said[-2]
    assert "transformers runs Qwen2ForCausalLM with causal attention: to fill in" in said[-4]
    assert "position i - 1 are for token i (mdm_shift" in said[-3]
    models.logits(tmp_path / "back", torch.tensor([[96, 1]]), causal=False)  # transformers loads it

    # It is now a diffusion model, and still predicts the token after each position.
    assert config["mdm_shift"] is True
    to_megatron(str(tmp_path / "back"), str(tmp_path / "again"), log=lambda line: None)
    launch = (tmp_path / "again" / "launch.txt").read_text()
    assert "--mdm-shift" in launch and "--mdm-mask-token-id 96" in launch
    assert load_common_state_dict(str(tmp_path / "again" / "release"))["args"].mdm_shift is True


def test_an_unused_row_and_the_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    source, said = models.make("llama", tmp_path / "hf"), []
    write_tokenizer(source, 90)
    to_megatron(str(source), str(tmp_path / "mg"), add_mask=True, verify=True, log=said.append)
    # Only the logits of that row differ.
    assert said[1].startswith("verified: logits of")
    said = said[2:]
    assert "id 90, an unused row" in said[0]
    got, original = rows(tmp_path / "mg", ROWS[0]), load_file(source / SINGLE)
    embedding = original["model.embed_tokens.weight"]
    torch.testing.assert_close(got[90], embedding[:90].mean(dim=0), rtol=0, atol=1e-7)
    others = [i for i in range(96) if i != 90]
    assert torch.equal(got[others], embedding[others])
    to_hugging_face(str(tmp_path / "mg"), str(tmp_path / "back"), log=said.append)
    for directory in (tmp_path / "mg" / "huggingface", tmp_path / "back"):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        assert (tokenizer.mask_token, tokenizer.mask_token_id) == (MASK_TOKEN, 90)
        assert len(tokenizer) == 91 and tokenizer("w1 w2").input_ids == [1, 2]
    launch = (tmp_path / "mg" / "launch.txt").read_text()
    assert f"--tokenizer-model {tmp_path / 'mg' / 'huggingface'}" in launch


def test_the_row_of_the_mask_token_is_not_lost(tmp_path):
    """The config.json is the model's from before it had a mask token."""
    source = models.make("qwen2", tmp_path / "hf")
    to_megatron(str(source), str(tmp_path / "mg"), add_mask=True, log=str)
    with pytest.raises(UserError, match="the checkpoint's mask token 96 lies outside the 96 rows"):
        to_hugging_face(str(tmp_path / "mg"), str(tmp_path / "back"), config_from=str(source))
    assert not (tmp_path / "back").exists()

    unused = models.make("llama", tmp_path / "unused")
    write_tokenizer(unused, 90)
    to_megatron(str(unused), str(tmp_path / "mg90"), add_mask=True, log=str)
    to_hugging_face(
        str(tmp_path / "mg90"), str(tmp_path / "back"), config_from=str(unused), log=str
    )
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["vocab_size"], config["mask_token_id"], config["mdm_shift"]) == (96, 90, True)


@pytest.mark.parametrize("tokenizer", [True, False])
def test_no_token_of_the_run_loses_its_row(tokenizer, tmp_path):
    """The config.json is of a smaller model, whose tensors could pass for the larger model's."""
    source, smaller = models.make("llama", tmp_path / "hf"), tmp_path / "smaller"
    if tokenizer:
        write_tokenizer(source, 90)
    to_megatron(str(source), str(tmp_path / "mg"), multiple=64, log=str)
    smaller.mkdir()
    config = json.loads((source / "config.json").read_text())
    tokens = 96  # of the model; its tokenizer may have fewer
    for size, lost in ((tokens - 1, 1), (tokens, 0), (tokens + 2, 0)):
        (smaller / "config.json").write_text(json.dumps({**config, "vocab_size": size}))
        said = []
        convert = functools.partial(
            to_hugging_face,
            str(tmp_path / "mg"),
            str(tmp_path / f"back{size}"),
            config_from=str(smaller),
            log=said.append,
        )
        if lost:
            wanted = f"has {size} tokens and the run {tokens}, of which the last 1 would be lost"
            with pytest.raises(UserError, match=wanted):
                convert()
            assert not (tmp_path / f"back{size}").exists()
            continue
        convert()
        assert f"left out {128 - size} padding rows of the vocabulary" in said
        assert tokenizer == any("no tokenizer is written: copy the run's" in line for line in said)


def test_rows_that_are_tokens():
    """The checkpoint tells their number; if it does not, the run's tokenizer does."""

    def check(rows, tokens=0, padded=128, **args):
        args = Namespace(**{"vocab_size": None, "tokenizer_model": "my.model", **args})
        words = {str(i): i for i in range(tokens)}
        to_hugging_face_module.check_rows(args, words, rows, padded, Path("model"))

    check(100, mdm_vocab_size=100)
    check(100, tokens=120, mdm_vocab_size=100)
    check(100, tokens=100)
    check(128)  # no row is left out
    for rows, settings in ((99, {"mdm_vocab_size": 100}), (100, {"tokens": 101})):
        with pytest.raises(UserError, match=f"has {rows} tokens and the run {rows + 1}"):
            check(rows, **settings)
    with pytest.raises(UserError, match="is not at my.model: put it there"):
        check(100)


def test_the_tokens_that_are_written_are_those_of_the_run(tmp_path):
    source, said = models.make("llama", tmp_path / "hf"), []
    write_tokenizer(source, 90)
    to_megatron(str(source), str(tmp_path / "mg"), log=str)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(source / "config.json", other)
    words = {f"w{i}": i for i in range(90)} | {"w7": 8, "w8": 7, "<unk>": 89}
    models.write_tokenizer(other, words)
    with pytest.raises(UserError, match="'w7' has id 8 there and 7 in the run. Give --hf-config"):
        to_hugging_face(str(tmp_path / "mg"), str(tmp_path / "back"), config_from=str(other))
    models.write_tokenizer(other, {f"w{i}": i for i in range(89)} | {"<unk>": 89, "more": 90})
    with pytest.raises(UserError, match="'more' has id 90 there and None in the run"):
        to_hugging_face(str(tmp_path / "mg"), str(tmp_path / "back"), config_from=str(other))
    (tmp_path / "mg" / "huggingface").rename(tmp_path / "moved")
    to_hugging_face(
        str(tmp_path / "mg"),
        str(tmp_path / "back"),
        config_from=str(tmp_path / "moved"),
        log=said.append,
    )
    assert "was not compared with the run's, which is not at" in said[1]


def test_a_tokenizer_that_was_replaced_is_not_written(tmp_path):
    """The run's tokenizer, which would be written, was replaced after the training."""
    source = models.make("llama", tmp_path / "hf")
    write_tokenizer(source, 90)
    to_megatron(str(source), str(tmp_path / "mg"), log=str)
    words = {f"w{i}": i for i in range(90)} | {"w7": 8, "w8": 7, "<unk>": 89}
    models.write_tokenizer(tmp_path / "mg" / "huggingface", words)
    with pytest.raises(UserError, match="huggingface is not the one that the checkpoint was train"):
        to_hugging_face(str(tmp_path / "mg"), str(tmp_path / "back"))


def test_a_sentencepiece_tokenizer_is_compared_too(tmp_path):
    (tmp_path / "text.txt").write_text("some words to learn from\n" * 50)
    model = tmp_path / "my.model"
    train_tokenizer([str(tmp_path / "text.txt")], str(model), vocab_size=280)
    tokens, directory = tokens_of(model), tmp_path / "hf"
    assert len(tokens) == 280 and tokens["<mask>"] == 3
    directory.mkdir()
    args = Namespace(tokenizer_model=str(model))
    compare = functools.partial(
        to_hugging_face_module._compare_tokenizers, args, tokens, directory, 3
    )
    shutil.copy(model, directory / "tokenizer.model")
    assert list(compare()) == []
    settings = directory / "tokenizer_config.json"  # names only some of the pieces
    settings.write_text(json.dumps({"added_tokens_decoder": {"3": {"content": "<mask>"}}}))
    assert tokens_of(directory) == tokens and list(compare()) == []
    (directory / "added_tokens.json").write_text(json.dumps({"<new>": 280}))
    assert tokens_of(directory) == {**tokens, "<new>": 280}
    models.write_tokenizer(directory, {**tokens, "more": 280})  # transformers prefers this file
    with pytest.raises(UserError, match="'more' has id 280 there and None in the run"):
        list(compare())


def test_the_written_model_computes_the_same_as_it_is_told_to_be_used(tmp_path, megatron_logits):
    """Uses it as the tool and its guide say: attention that hides nothing, and the shift."""
    import transformers

    source = models.make("qwen2", tmp_path / "hf")
    to_megatron(str(source), str(tmp_path / "mg"), add_mask=True, log=str)
    to_hugging_face(str(tmp_path / "mg"), str(tmp_path / "back"), log=str)
    tokens = torch.tensor([[5, 96, 96, 7, 96, 3]])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager"
    )
    with torch.no_grad():
        logits = model(tokens, attention_mask=torch.zeros(1, 1, 6, 6)).logits
        causal = model(tokens).logits
    shifted = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    ours = megatron_logits(tmp_path / "mg", tokens)["full"]
    torch.testing.assert_close(ours, shifted, rtol=0, atol=1e-4)
    assert (ours - logits).abs().max() > 0.1 and (logits - causal).abs().max() > 0.1


def test_a_tokenizer_that_is_too_large(tmp_path):
    source = models.make("llama", tmp_path / "hf")
    write_tokenizer(source, 97)
    with pytest.raises(UserError, match="has 97 tokens, the model's vocabulary 96"):
        to_megatron(str(source), str(tmp_path / "mg"))
    assert not (tmp_path / "mg").exists()


def test_a_second_mask_token_is_refused(tmp_path):
    source = models.make("llada", tmp_path / "hf")
    with pytest.raises(UserError, match="mask token 90 already"):
        to_megatron(str(source), str(tmp_path / "mg"), add_mask=True)


def test_a_mask_token_that_only_the_tokenizer_names(tmp_path):
    """The user chooses whether it is the model's, since nothing tells whether it is shifted."""
    source, said = models.make("llama", tmp_path / "hf"), []
    models.write_tokenizer(source, {"<unk>": 0, "<M>": 1, "w": 2}, mask_token="<M>")
    convert = functools.partial(to_megatron, str(source), str(tmp_path / "mg"))
    advice = 'has the mask token <M> with id 1 already: add "mask_token_id": 1 to config.json'
    with pytest.raises(UserError, match=f"--add-mask-token: the tokenizer {advice}"):
        convert(add_mask=True)
    convert(log=said.append)
    assert any(f"config.json names no mask token: the tokenizer {advice}" in line for line in said)


@pytest.mark.parametrize("mask", ["<M>", {"content": "<M>", "special": True}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_where_a_tokenizer_names_its_mask_token(name, mask, tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "<M>": 7}))
    assert known_mask(tmp_path) is None
    (tmp_path / name).write_text(json.dumps({"mask_token": mask}))
    assert "<M> with id 7 already" in known_mask(tmp_path)
    (tmp_path / name).write_text(json.dumps({"mask_token": "no token"}))
    assert known_mask(tmp_path) is None
