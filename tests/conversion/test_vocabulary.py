"""A mask token for autoregressive models, padding, and the tokenizer that goes along."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_mdm.conversion import hub
from megatron_mdm.conversion.to_hugging_face import to_hugging_face
from megatron_mdm.conversion.to_megatron import to_megatron
from megatron_mdm.conversion.torch_dist import DistCheckpoint, locate
from megatron_mdm.conversion.vocabulary import MASK_TOKEN
from megatron_mdm.errors import UserError
from tests.conversion import models

ROWS = ("embedding.word_embeddings.weight", "output_layer.weight")


def write_tokenizer(directory, tokens):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(tokens - 1)} | {"<unk>": tokens - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(
        directory
    )


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
        say=said.append,
    )
    original = load_file(source / hub.SINGLE)
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

    to_hugging_face(str(tmp_path / "mg"), str(tmp_path / "back"), verify=True, say=said.append)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["vocab_size"] == 97 and config["mask_token_id"] == 96
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    back = load_file(tmp_path / "back" / hub.SINGLE)
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(back[name][:96] if name in names else back[name], tensor)
    assert "left out 7 padding rows" in said[-2]
    models.logits(tmp_path / "back", torch.tensor([[96, 1]]), causal=False)  # transformers loads it


def test_an_unused_row_and_the_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    source, said = models.make("llama", tmp_path / "hf"), []
    write_tokenizer(source, 90)
    to_megatron(str(source), str(tmp_path / "mg"), add_mask=True, say=said.append)
    assert "id 90, an unused row" in said[0]
    got, original = rows(tmp_path / "mg", ROWS[0]), load_file(source / hub.SINGLE)
    embedding = original["model.embed_tokens.weight"]
    torch.testing.assert_close(got[90], embedding[:90].mean(dim=0), rtol=0, atol=1e-7)
    others = [i for i in range(96) if i != 90]
    assert torch.equal(got[others], embedding[others])
    to_hugging_face(str(tmp_path / "mg"), str(tmp_path / "back"), say=said.append)
    for directory in (tmp_path / "mg" / "huggingface", tmp_path / "back"):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        assert (tokenizer.mask_token, tokenizer.mask_token_id) == (MASK_TOKEN, 90)
        assert len(tokenizer) == 91 and tokenizer("w1 w2").input_ids == [1, 2]
    launch = (tmp_path / "mg" / "launch.txt").read_text()
    assert f"--tokenizer-model {tmp_path / 'mg' / 'huggingface'}" in launch


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
