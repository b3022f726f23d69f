"""Fingerprints are equal for a tokenizer and its extensions, and differ if texts get other ids."""

import dataclasses
import json

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from megatron_mdm.data.encoding import TokenizerData
from megatron_mdm.data.fingerprint import Fingerprint, differs, fingerprint
from megatron_mdm.data.load_tokenizer import load_sentencepiece

WORDS = ["a", "b", "c", "</s>"]


def hugging_face(
    words=WORDS, mask=None, eod=3, normalizer=None, splitter=pre_tokenizers.WhitespaceSplit
):
    """A tokenizer of words, numbered in order; a None in the list leaves its id unused."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words) if w}, unk_token="a"))
    inner.pre_tokenizer = splitter()
    if normalizer:
        inner.normalizer = normalizer
    return TokenizerData(len(words), eod, mask, tokenizer_json=inner.to_str())


def pieces(directory, words="some words", **options):
    options = {"vocab_size": 12, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words] * 9), model_prefix=str(directory / "t"), **options
    )
    return load_sentencepiece(str(directory / "t.model"))


def test_a_fingerprint_is_small_plain_and_the_same_each_time():
    made = fingerprint(hugging_face())
    assert made == fingerprint(hugging_face()) and differs(made, hugging_face()) == ""
    plain = json.loads(json.dumps(dataclasses.asdict(made)))
    assert Fingerprint(**plain) == made and len(str(plain)) < 400
    assert (made.kind, made.size, made.eod) == ("HuggingFaceTokenizer", 4, 3)


@pytest.mark.parametrize(
    ("extended", "back"),
    [
        (hugging_face([*WORDS, "d", "e"]), "it has 4 ids and not 6 or more"),
        (hugging_face([*WORDS, "<mask>"], mask=4), ""),
        (hugging_face([*WORDS, "d", None, "<mask>"], mask=6), "it has 4 ids and not 5 or more"),
    ],
)
def test_an_extension_is_no_difference_and_a_loss_is_one(extended, back):
    assert differs(fingerprint(hugging_face()), extended) == ""
    assert differs(fingerprint(extended), hugging_face()) == back


def test_a_mask_token_may_be_added_in_a_hole_or_declared_later():
    hole = hugging_face([*WORDS, None, "d"])
    filled = hugging_face([*WORDS, "<mask>", "d"], mask=4)
    named = hugging_face([*WORDS, "<mask>", "d"], mask=None)
    for old in (hole, filled, named):
        for new in (hole, filled, named):
            # If no tokenizer declares the mask token, it is a token like all others.
            is_other = (old, new) in ((hole, named), (named, hole))
            assert bool(differs(fingerprint(old), new)) == is_other


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (hugging_face(["b", "a", "c", "</s>"]), "its ids below 4 stand for other tokens"),
        (hugging_face(["a", "b", "c", "</s>", "d"][1:]), "its ids below 4 stand for other tokens"),
        (hugging_face(["a", None, "c", "</s>"]), "its ids below 4 stand for other tokens"),
        (hugging_face(WORDS[:3]), "it has 3 ids and not 4 or more"),
        (hugging_face(eod=None), "its end of document is no token and not token 3"),
        (hugging_face(eod=0), "its end of document is token 0 and not token 3"),
        (hugging_face(normalizer=normalizers.Lowercase()), "it normalizes text differently"),
        (hugging_face(splitter=pre_tokenizers.Whitespace), "it splits text differently before it"),
    ],
)
def test_what_moves_ids_is_said(changed, message):
    assert message in differs(fingerprint(hugging_face()), changed)


def test_two_differences_are_one_sentence():
    changed = hugging_face(["b", "a", "c", "</s>"], eod=0)
    assert differs(fingerprint(hugging_face()), changed) == (
        "its ids below 4 stand for other tokens; its end of document is token 0 and not token 3"
    )


def test_added_tokens_count_as_others_do():
    def with_added(*tokens):
        data = hugging_face()
        inner = Tokenizer.from_str(data.tokenizer_json)
        inner.add_tokens([AddedToken(token, normalized=False) for token in tokens])
        return dataclasses.replace(data, vocab_size=4 + len(tokens), tokenizer_json=inner.to_str())

    assert differs(fingerprint(with_added("x")), with_added("x", "y")) == ""
    assert "ids below 5" in differs(fingerprint(with_added("x")), with_added("y", "x"))


def test_sentencepiece(tmp_path):
    old = pieces(tmp_path)
    made = fingerprint(old)
    assert (made.kind, made.size) == ("SentencePieceTokenizer", 12)
    assert differs(made, old) == ""
    assert "below 12 stand for other" in differs(made, pieces(tmp_path, "other letters"))
    for options in (
        {"normalization_rule_name": "identity"},
        {"normalization_rule_name": "nmt_nfkc_cf"},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": False},
    ):
        assert "it normalizes text differently" in differs(made, pieces(tmp_path, **options))
    assert differs(made, hugging_face()) == (
        "it is a HuggingFaceTokenizer and not a SentencePieceTokenizer"
    )
    masked = pieces(tmp_path, vocab_size=13, control_symbols=["<mask>"])
    assert masked.mask == 3  # before other pieces, whose ids it moves
    assert "below 12 stand for other" in differs(made, masked)


def test_a_tokenizer_without_text_has_a_size_and_an_end():
    null = Fingerprint("NullTokenizer", 100, 0)
    assert differs(null, Fingerprint("NullTokenizer", 120, 0)) == ""
    assert differs(null, Fingerprint("NullTokenizer", 99, 0)) == "it has 99 ids and not 100 or more"
    assert "end of document" in differs(null, Fingerprint("NullTokenizer", 100, 1))
    assert "it is a NullTokenizer and not a Hugging" in differs(fingerprint(hugging_face()), null)
