"""Tokenizers: Dream's files become a fast tokenizer, ids are kept, and damage is named."""

import json

import pytest
from tokenizers import pre_tokenizers

from megatron_mdm.conversion.to_megatron import to_megatron
from megatron_mdm.conversion.tokenizer import add_mask_token, tokenizer_size, write_fast_tokenizer
from megatron_mdm.data.encoding import open_hugging_face
from megatron_mdm.data.load_tokenizer import has_chat_template, load_hugging_face
from megatron_mdm.errors import UserError
from tests.conversion import models

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # ids 0 to 255
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello"]
HELLO, SPACE_HELLO = 259, 260
ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", "<|beginoftext|>", "<|mask|>"]
IDS = {token: 261 + i for i, token in enumerate(ADDED)}
END, START, TOOL, MASK = IDS["<|endoftext|>"], IDS["<|im_start|>"], IDS["<tool>"], IDS["<|mask|>"]
NOT_RUN = "raise RuntimeError('this code is not to be run')\n"


def write_dream(directory, **changes):
    """Writes the files of Dream's tokenizer, with changes to tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    vocab = BYTES + [merge.replace(" ", "") for merge in MERGES]
    merges = "\n".join(["#version: 0.2", *MERGES, ""])
    settings = {
        "added_tokens_decoder": {
            str(i): {
                "content": token,
                **dict.fromkeys(["lstrip", "normalized", "rstrip", "single_word"], False),
                "special": token != "<tool>",
            }
            for token, i in IDS.items()
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|beginoftext|>",
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "DreamTokenizer",
        "unk_token": "<|endoftext|>",
        **changes,
    }
    write(directory / "vocab.json", {token: i for i, token in enumerate(vocab)})
    write(directory / "added_tokens.json", dict(reversed(IDS.items())))
    write(directory / "tokenizer_config.json", settings)
    (directory / "merges.txt").write_text(merges, encoding="utf-8")
    (directory / "tokenization_dream.py").write_text(NOT_RUN)


def write(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def of_bytes(text):
    """Ids of the bytes of a text, without any merge."""
    ((pieces, _),) = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text)
    return [BYTES.index(byte) for byte in pieces]


@pytest.fixture(scope="module")
def dream(tmp_path_factory):
    """A model with its tokenizer, as released and converted."""
    root = tmp_path_factory.mktemp("dream")
    code = {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.Dream"}
    models.make(
        "dream", root / "hf", vocab_size=272, mask_token_id=MASK, eos_token_id=END, auto_map=code
    )
    write_dream(root / "hf")
    (root / "hf" / "configuration_dream.py").write_text(NOT_RUN)
    to_megatron(str(root / "hf"), str(root / "mg"), log=lambda line: None)
    return root


def test_dream_text_can_be_tokenized(dream, monkeypatch):
    with pytest.raises(UserError, match="it needs the files that save_pretrained"):
        load_hugging_face(str(dream / "hf"))
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked whether to run code"))
    directory = str(dream / "mg" / "huggingface")
    tokenizer = load_hugging_face(directory)
    assert (tokenizer.vocab_size, tokenizer.eod) == (267, END)
    encode, with_special = tokenizer.load(), tokenizer.load(special=True)
    assert encode("hello hello") == [HELLO, SPACE_HELLO]
    assert encode(" 12hello") == [*of_bytes(" 12"), HELLO]
    assert encode("e\u0301!") == of_bytes("\u00e9!")  # canonical composition
    assert with_special("<|im_start|>hello<tool><|mask|>") == [START, HELLO, TOOL, MASK]
    assert MASK not in encode("<|mask|>") and TOOL in encode("<tool>")
    opened = open_hugging_face(directory)
    assert (opened.mask_token_id, opened.pad_token_id) == (MASK, END)
    assert opened.bos_token == "<|beginoftext|>"
    assert opened.decode(with_special("<|im_start|>hello hello<tool>")) == (
        "<|im_start|>hello hello<tool>"
    )
    assert has_chat_template(directory)
    launch = (dream / "mg" / "launch.txt").read_text()
    assert "HuggingFaceTokenizer" in launch and "--trust-remote-code" not in launch
    # The released files stay beside the new one.
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenization_dream.py"):
        assert (dream / "mg" / "huggingface" / name).read_bytes() == (
            dream / "hf" / name
        ).read_bytes()


def test_added_tokens_without_a_description(tmp_path):
    """Releases from before added_tokens_decoder have only added_tokens.json."""
    write_dream(tmp_path)
    settings = read(tmp_path / "tokenizer_config.json")
    del settings["added_tokens_decoder"]
    write(tmp_path / "tokenizer_config.json", settings)
    write_fast_tokenizer(tmp_path)
    encode = load_hugging_face(str(tmp_path)).load(special=True)
    assert encode("<|im_start|>hello<tool><|mask|>") == [START, HELLO, TOOL, MASK]


def test_other_tokenizers_are_left_alone(tmp_path):
    for name, change, missing in (
        ("another class", {"tokenizer_class": "GPT2Tokenizer"}, None),
        ("no merges", {}, "merges.txt"),
    ):
        write_dream(tmp_path / name, **change)
        if missing:
            (tmp_path / name / missing).unlink()
        before = {path: path.read_bytes() for path in (tmp_path / name).iterdir()}
        write_fast_tokenizer(tmp_path / name)
        assert {path: path.read_bytes() for path in (tmp_path / name).iterdir()} == before


def change(name, **values):
    return lambda directory: write(directory / name, {**read(directory / name), **values})


DISAGREEING = {
    "an id that comes too late": (
        change("added_tokens.json", **{"<|extra|>": 269}),
        "'<|extra|>' has 269 in one of the tokenizer's files and None in the tokenizer that all",
    ),
    "two ids": (
        change("added_tokens.json", **{"<|mask|>": 262}),
        "'<|mask|>' has 262 in one of the tokenizer's files and 266 in the tokenizer that all of",
    ),
    "a special token without id": (
        change("tokenizer_config.json", mask_token="<|hole|>"),
        "'<|hole|>' has no id in one of the tokenizer's files",
    ),
    "a merge of unknown parts": (
        lambda directory: (directory / "merges.txt").write_text("#version: 0.2\nq zz\n"),
        "vocab.json and merges.txt make no byte-level BPE",
    ),
}


@pytest.mark.parametrize("case", DISAGREEING)
def test_files_of_two_tokenizers_are_refused(case, tmp_path):
    damage, message = DISAGREEING[case]
    write_dream(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as caught:
        write_fast_tokenizer(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", "[]", "tokenizer.json does not hold a JSON object"),
        ("tokenizer.json", "[1]", "tokenizer.json does not hold a JSON object"),
        ("tokenizer.json", "{}", "tokenizer.json is not a tokenizer's (KeyError"),
        ("tokenizer.json", '{"model": {"vocab": {"a": "b"}}}', "tokenizer.json is not a token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"a": {"content": "b"}}}', "invalid l"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": 1}}', "is not a tokenizer's"),
        ("added_tokens.json", '{"a": null}', "added_tokens.json is not a tokenizer's (ValueError"),
        ("vocab.json", "nonsense", "vocab.json is not valid JSON"),
        ("tokenizer.model", "junk", "tokenizer.model is not a sentencepiece model"),
    ],
)
def test_damaged_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        tokenizer_size(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_mask_token_that_would_get_another_id_is_refused(tmp_path):
    models.write_tokenizer(tmp_path, {"a": 0, "<unk>": 1, "z": 9})
    before = tokenizer_size(tmp_path)
    with pytest.raises(UserError, match="so that .* would become token 3 and not 10: add a mask"):
        add_mask_token(tmp_path, before)
