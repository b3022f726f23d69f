"""A mask token for autoregressive models, padding, and the tokenizer that goes along."""

import json

import pytest
import torch
from megatron.core.dist_checkpointing import load_common_state_dict
from safetensors.torch import load_file

from megatron_mdm.conversion import hub
from megatron_mdm.conversion.to_hugging_face import to_hugging_face
from megatron_mdm.conversion.to_megatron import to_megatron
from megatron_mdm.conversion.tokenizer import MASK_TOKEN
from megatron_mdm.conversion.torch_dist import DistCheckpoint, locate
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
    assert "transformers runs Qwen2ForCausalLM with causal attention: to fill in" in said[-4]
    assert "position i - 1 are for token i (mdm_shift" in said[-3]
    models.logits(tmp_path / "back", torch.tensor([[96, 1]]), causal=False)  # transformers loads it

    # It is a diffusion model, and stays one that predicts the token after each position.
    assert config["mdm_shift"] is True
    to_megatron(str(tmp_path / "back"), str(tmp_path / "again"), say=lambda line: None)
    launch = (tmp_path / "again" / "launch.txt").read_text()
    assert "--mdm-shift" in launch and "--mdm-mask-token-id 96" in launch
    assert load_common_state_dict(str(tmp_path / "again" / "release"))["args"].mdm_shift is True


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


def test_the_row_of_the_mask_token_is_not_lost(tmp_path):
    """With the config.json of the model from before it had one."""
    source = models.make("qwen2", tmp_path / "hf")
    to_megatron(str(source), str(tmp_path / "mg"), add_mask=True, say=str)
    with pytest.raises(UserError, match="the checkpoint's mask token 96 lies outside the 96 rows"):
        to_hugging_face(str(tmp_path / "mg"), str(tmp_path / "back"), config_from=str(source))
    assert not (tmp_path / "back").exists()

    unused = models.make("llama", tmp_path / "unused")
    write_tokenizer(unused, 90)
    to_megatron(str(unused), str(tmp_path / "mg90"), add_mask=True, say=str)
    to_hugging_face(
        str(tmp_path / "mg90"), str(tmp_path / "back"), config_from=str(unused), say=str
    )
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["vocab_size"], config["mask_token_id"], config["mdm_shift"]) == (96, 90, True)


def test_the_written_model_computes_the_same_as_it_is_told_to_be_used(tmp_path, megatron_logits):
    """As README and the tool say: attention that hides nothing, and the shift."""
    import transformers

    source = models.make("qwen2", tmp_path / "hf")
    to_megatron(str(source), str(tmp_path / "mg"), add_mask=True, say=str)
    to_hugging_face(str(tmp_path / "mg"), str(tmp_path / "back"), say=str)
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
