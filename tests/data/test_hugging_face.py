"""Preprocessing with Hugging Face tokenizers."""

import dataclasses
import sys

import numpy as np
import pytest
import sentencepiece

from megatron_mdm.data.encoding import hugging_face_data
from megatron_mdm.data.fingerprint import differs, fingerprint
from megatron_mdm.data.identity import data_identity
from megatron_mdm.data.load_tokenizer import load_hugging_face, load_sentencepiece
from megatron_mdm.data.pairs import PairKeys
from megatron_mdm.errors import UserError
from tests.data.texts import WORDS, read, run, save_hugging_face, write_jsonl


def test_hugging_face(tmp_path):
    tokenizer = save_hugging_face(tmp_path / "hf", WORDS, eos_token="</s>")
    texts = ["a b c a b c", "a <mask> </s> b", "b<mask>", " "]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    summary = run([source], tmp_path / "out", tokenizer, workers=2)
    # A special token that a text spells is encoded as a word unknown to the tokenizer.
    assert read(tmp_path / "out") == [[1, 2, 3, 1, 2, 3, 5], [1, 0, 0, 2, 5], [0, 5]]
    assert summary.empty_documents == 1


def test_special_tokens_in_text_are_asked_for_and_recorded(tmp_path, tokenizer):
    """For prompts that a template has already rendered. Generation encodes them in the same way."""
    words = save_hugging_face(tmp_path / "hf", WORDS, eos_token="</s>")
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a </s> b", "prompt": "a </s>", "response": "b </s>"}\n')

    def encoded(**options):
        run([str(source)], tmp_path / "out", words, **options)
        recorded = data_identity(str(tmp_path / "out")).special_tokens
        assert recorded == options.get("special_tokens", False)
        return (tmp_path / "out.bin").read_bytes()

    def ids(*tokens):
        return np.array(tokens, dtype=np.uint16).tobytes()

    assert encoded() == encoded(special_tokens=False) == ids(1, 0, 2, 5)
    assert encoded(special_tokens=True) == ids(*words.load(special=True)("a </s> b"), 5)
    assert encoded(special_tokens=True) == ids(1, 5, 2, 5)
    assert encoded(pairs=PairKeys()) == ids(1, 0, 2, 0, 5)
    assert encoded(pairs=PairKeys(), special_tokens=True) == ids(1, 5, 2, 5)
    with pytest.raises(UserError, match="a.jsonl:1: the text spells .* mask token"):
        source.write_text('{"text": "a <mask>"}')
        encoded(special_tokens=True)
    with pytest.raises(UserError, match="--special-tokens: no text spells a special token of"):
        run([str(source)], tmp_path / "out", tokenizer, special_tokens=True)
    conversations = PairKeys(messages="m", template=str(tmp_path / "hf"))
    with pytest.raises(UserError, match="--no-special-tokens: a chat template writes special"):
        run([str(source)], tmp_path / "out", words, pairs=conversations, special_tokens=False)


def test_text_that_becomes_the_mask_token_is_refused(tmp_path, expected):
    """Such a text spells a vocabulary word or a piece that is the mask token."""
    words = save_hugging_face(tmp_path / "hf", [*WORDS, "[MASK]"], eos_token="</s>")
    assert words.mask == 5  # the declared mask, <mask>, which no text spells
    words = dataclasses.replace(words, mask=4)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words"] * 9),
        model_prefix=str(tmp_path / "t"),
        vocab_size=13,
        user_defined_symbols=["[MASK]"],
        minloglevel=2,
    )
    pieces = load_sentencepiece(str(tmp_path / "t.model"))
    assert pieces.mask == 3
    source = write_jsonl(tmp_path / "a.jsonl", ["a", "a [MASK]", "b"])
    for tokenizer in (words, pieces):
        with pytest.raises(
            UserError, match=r"a.jsonl:2: the text spells .* mask token \(id [34]\)"
        ):
            run([source], tmp_path / "out", tokenizer)
        summary = run([source], tmp_path / "out", tokenizer, skip_bad_lines=True)
        assert (summary.documents, summary.bad_documents) == (2, 1)


@pytest.mark.parametrize("end", ["eos_token", "sep_token"])
def test_hugging_face_agrees_with_megatron(tmp_path, end):
    """BERT's tokenizer has a sep token but no eos token."""
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer

    tokenizer = save_hugging_face(tmp_path / "hf", WORDS, **{end: "</s>"})
    theirs = HuggingFaceTokenizer(str(tmp_path / "hf"))
    text = "a b nonsense c"
    run([write_jsonl(tmp_path / "a.jsonl", [text])], tmp_path / "out", tokenizer)
    assert read(tmp_path / "out") == [[*theirs.text_to_ids(text), theirs.eod]]
    assert tokenizer.vocab_size == theirs.vocab_size
    assert differs(fingerprint(tokenizer), hugging_face_data(theirs.tokenizer)) == ""


@pytest.mark.parametrize(
    ("size", "dtype"), [(65499, "uint16"), (65500, "int32"), (65536, "int32"), (65537, "int32")]
)
def test_size_of_the_vocabulary_chooses_the_type(tmp_path, size, dtype):
    words = WORDS + [f"w{i}" for i in range(size - len(WORDS) - 2)]
    tokenizer = save_hugging_face(tmp_path / "hf", words, eos_token="</s>")
    assert tokenizer.vocab_size == size
    source = write_jsonl(tmp_path / "a.jsonl", [f"a {words[-1]}"])
    assert run([source], tmp_path / "out", tokenizer).dtype == dtype
    assert read(tmp_path / "out") == [[1, size - 3, size - 1]]
    assert (tmp_path / "out.bin").stat().st_size == 3 * np.dtype(dtype).itemsize


def test_hugging_face_mistakes(tmp_path, monkeypatch):
    tokenizer = save_hugging_face(tmp_path / "hf", WORDS)
    with pytest.raises(UserError, match="--no-append-eod"):
        run([__file__], tmp_path / "out", tokenizer)
    with pytest.raises(UserError, match="--hf-tokenizer .*none: no such directory"):
        load_hugging_face(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--hf-tokenizer .*empty: cannot be loaded") as error:
        load_hugging_face(str(tmp_path / "empty"))
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="--hf-tokenizer needs the transformers package"):
        load_hugging_face(str(tmp_path / "hf"))
