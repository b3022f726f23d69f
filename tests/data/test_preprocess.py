"""Preprocessing: exact tokens, the same for every number of workers, complete or absent."""

import dataclasses
import gzip
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import resource
import runpy
import signal
import subprocess
import sys
import sysconfig
import threading
import time

import numpy as np
import psutil
import pytest
import sentencepiece

from megatron_mdm.data import preprocess as module
from megatron_mdm.data.documents import read_documents, resolve_inputs
from megatron_mdm.data.encoding import hugging_face_data
from megatron_mdm.data.fingerprint import differs, fingerprint
from megatron_mdm.data.identity import data_identity
from megatron_mdm.data.load_tokenizer import load_hugging_face, load_sentencepiece
from megatron_mdm.data.pairs import PairKeys
from megatron_mdm.data.preprocess import preprocess
from megatron_mdm.data.tokenizer import train_tokenizer
from megatron_mdm.data.workers import Workers
from megatron_mdm.errors import UserError
from megatron_mdm.files import complete_or_absent, termination_raises
from tests import ROOT

TOOL = ROOT / "tools" / "preprocess_data.py"
SOURCE = (pathlib.Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text()
# Of very different lengths, so that the workers get out of step.
TEXTS = [SOURCE[i * i : i * i + 7 * (i % 13) ** 3 + 1] for i in range(200)]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "a.py").write_text(SOURCE)
    train_tokenizer([str(directory / "a.py")], str(directory / "t.model"), vocab_size=500)
    return directory / "t.model"


@pytest.fixture(scope="session")
def tokenizer(model):
    return load_sentencepiece(str(model))


@pytest.fixture
def expected(model):
    """Returns a function from texts to their tokens, made in the plainest way."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return lambda texts: [[*processor.encode(text), processor.eos_id()] for text in texts]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def run(inputs, prefix, tokenizer, **options):
    options = {"workers": 1, "progress": False} | options
    return preprocess(inputs, str(prefix), tokenizer, **options)


def read(prefix):
    """Returns the documents, checking that each is one sequence."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def run_tool_here(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name="__main__")


# What is written


def test_tokens_and_summary(tmp_path, tokenizer, expected):
    texts = [*TEXTS, "<mask> <eod>", "\t\r\n", "\U0001f600"]
    summary = run([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out", tokenizer)
    documents = read(tmp_path / "out")
    assert documents == expected(texts)
    assert summary.documents == len(texts)
    assert summary.tokens == sum(map(len, documents))
    assert summary.text_bytes == sum(len(text.encode()) for text in texts)
    assert (summary.empty_documents, summary.bad_documents) == (0, 0)
    assert summary.dtype == "uint16"


def test_same_bytes_for_every_number_of_workers(tmp_path, monkeypatch, tokenizer, expected):
    monkeypatch.setattr(module, "CHUNK_BYTES", 3000)
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    outputs = set()
    for workers in (1, 3):
        run([source], tmp_path / "out", tokenizer, workers=workers)
        outputs.add(tuple((tmp_path / f"out{s}").read_bytes() for s in (".bin", ".idx")))
    assert len(outputs) == 1
    assert read(tmp_path / "out") == expected(TEXTS)


def test_all_formats_and_several_inputs(tmp_path, tokenizer, expected):
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS[:5])
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines.replace("\n", "\r\n\n  \n"))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.py").write_bytes(b"x = 1\r\n\ty\n\n")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    (tmp_path / "e").write_text('{"body": "text"}')
    (tmp_path / "f.txt").write_text('\ufeff\n {"body":\n"text"}\n')
    names = ["a.jsonl", "b.json.gz", "c.py", "d.txt.gz", "e", "f.txt"]
    inputs = [str(tmp_path / name) for name in names]
    run(inputs, tmp_path / "out", tokenizer, json_key="body")
    texts = [*TEXTS[:5], *TEXTS[:5], "x = 1\r\n\ty\n\n", "one\ntwo\n", "text"]
    assert read(tmp_path / "out") == expected([*texts, '\n {"body":\n"text"}\n'])

    run(inputs[1:2] + inputs[4:5], tmp_path / "out", tokenizer, file_format="text")
    assert read(tmp_path / "out") == expected([lines, '{"body": "text"}'])
    with pytest.raises(UserError, match=r"c\.py:1: bad JSON"):
        run(inputs[2:3], tmp_path / "out", tokenizer, file_format="jsonl")


@pytest.mark.parametrize("name", ["a", "a.txt", "a.ndjson", "a.txt.gz"])
@pytest.mark.parametrize("before", ["", "\ufeff", "\n \r\n"])
def test_lines_of_objects_are_jsonl_under_any_name(tmp_path, tokenizer, expected, name, before):
    content = (before + '{"text": "one\\ntwo"}\r\n{"text": "three \u2028 \x85 four"}\n').encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    run([str(tmp_path / name)], tmp_path / "out", tokenizer)
    assert read(tmp_path / "out") == expected(["one\ntwo", "three \u2028 \x85 four"])


def test_a_text_that_looks_like_jsonl_can_be_taken_for_text(tmp_path, tokenizer):
    (tmp_path / "settings").write_text('{"indent": 4}\n')
    with pytest.raises(UserError, match=r"settings:1: no key .* one text with --format text\)"):
        run([str(tmp_path / "settings")], tmp_path / "out", tokenizer)


@pytest.mark.parametrize(
    "text", ["{", "{x}\n", '{"a": 1} b', "[1]: a note\n", "[{{ name }}]\n", "[\n", '["a"]\n', ""]
)
def test_text_that_begins_like_json_stays_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    (document,) = read_documents([str(tmp_path / "a.txt")])
    assert (document.line, document.data.decode()) == (0, text)


@pytest.mark.parametrize("file_format", ["auto", "jsonl"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt"])
@pytest.mark.parametrize(
    "text", ['[\n {\n "text": "a"\n },\n{"text": "b"}\n]', '\ufeff[{"text": "a"}]', "[{}]", "[ {\n"]
)
def test_an_array_is_refused_and_not_read_in_part(tmp_path, tokenizer, text, name, file_format):
    (tmp_path / name).write_text(text)
    options = {"file_format": file_format, "skip_bad_lines": True}
    with pytest.raises(
        UserError, match=f"{name} holds a JSON array, .* one object a line: .* jq -c"
    ):
        run([str(tmp_path / name)], tmp_path / "out", tokenizer, **options)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    run([str(tmp_path / name)], tmp_path / "out", tokenizer, file_format="text")


def test_empty_documents_are_left_out_and_counted(tmp_path, tokenizer, expected):
    (tmp_path / "__init__.py").write_text("")
    inputs = [str(tmp_path / "__init__.py"), write_jsonl(tmp_path / "a.jsonl", ["a", "", "b"])]
    summary = run(inputs, tmp_path / "out", tokenizer)
    assert (summary.documents, summary.empty_documents) == (2, 2)
    assert read(tmp_path / "out") == expected(["a", "b"])
    with pytest.raises(UserError, match=r"no documents in 1 input file\(s\): 1 empty, 0 bad"):
        run(inputs[:1], tmp_path / "none", tokenizer)
    assert not list(tmp_path.glob("none*"))


def test_end_of_document_can_be_left_out(tmp_path, tokenizer, expected):
    source = write_jsonl(tmp_path / "a.jsonl", ["a b", "c"])
    run([source], tmp_path / "out", tokenizer, append_eod=False)
    assert read(tmp_path / "out") == [ids[:-1] for ids in expected(["a b", "c"])]


def test_tokenizer_without_end_of_document(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words"] * 9),
        model_prefix=str(tmp_path / "t"),
        vocab_size=10,
        eos_id=-1,
        bos_id=-1,
        minloglevel=2,
    )
    tokenizer = load_sentencepiece(str(tmp_path / "t.model"))
    source = write_jsonl(tmp_path / "a.jsonl", ["words"])
    with pytest.raises(UserError, match="no end-of-document .* pass --no-append-eod"):
        run([source], tmp_path / "out", tokenizer)
    run([source], tmp_path / "out", tokenizer, append_eod=False)
    assert len(read(tmp_path / "out")) == 1


# Input that is not as it should be

BAD_LINES = [
    (b'{"text": "a"', "bad JSON: Expecting ',' delimiter (column 13)"),
    (b" {", "an object that goes on on the next line: write each on one, as jq -c . does"),
    (b"text", "bad JSON: Expecting value (column 1)"),
    (b"[" * 100_000, "bad JSON: maximum recursion depth exceeded"),
    (b'{"text": ' + b"1" * 5000 + b"}", "bad JSON: Exceeds the limit (4300 digits)"),
    (b'["a"]', "a JSON array where an object is needed"),
    (b'{"txt": "a"}', 'no key "text" (see --json-key)'),
    (b'{"text": null}', 'the value of "text" is a JSON null, no string'),
    (b'{"text": 1}', 'the value of "text" is a JSON number, no string'),
    (b'{"text": "\xff"}', "not UTF-8: byte 0xff (invalid start byte)"),
    (b'{"text": "a\\ud800b"}', "the text holds a lone surrogate (\\ud800)"),
    (b'{"text": "\\udc80"}', "the text holds a lone surrogate (\\udc80)"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_bad_line_stops_with_its_place(tmp_path, tokenizer, line, reason):
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\nbad too\n')
    with pytest.raises(UserError) as error:
        run([str(source)], tmp_path / "out", tokenizer)
    assert str(error.value).startswith(f"{source}:3: {reason}")
    assert str(error.value).endswith("; mend it or pass --skip-bad-lines")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_first_bad_line_is_reported_whoever_finds_one_first(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    source = tmp_path / "a.jsonl"
    long = json.dumps({"text": SOURCE * 20})
    source.write_text(f"{long}\n{long[:-1]}\n" + "bad\n" * 20)
    with pytest.raises(UserError, match=r"a\.jsonl:2: bad JSON"):
        run([str(source)], tmp_path / "out", tokenizer, workers=3)


def test_bad_text_file_names_the_line(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xe9e\n")
    with pytest.raises(UserError, match=r"a\.txt:3: not UTF-8: byte 0xe9"):
        run([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer)


def test_bad_lines_can_be_skipped(tmp_path, monkeypatch, capfd, model, expected):
    good, text = tmp_path / "a.jsonl", tmp_path / "b.txt"
    good.write_bytes(b'{"text": "a"}\n' + b"\n".join(b for b, _ in BAD_LINES) + b'\n{"text": "b"}')
    text.write_bytes(b"\xff")
    run_tool_here(
        monkeypatch, "--input", good, text, "--tokenizer-model", model, "--skip-bad-lines",
        "--output-prefix", tmp_path / "out", "--workers", 2,
    )  # fmt: skip
    assert read(tmp_path / "out") == expected(["a", "b"])
    out, _ = capfd.readouterr()
    assert f"skipped: 0 empty, {len(BAD_LINES) + 1} bad documents\n" in out
    assert out.count(f"  {good}:") == 5
    assert f"  {good}:2: bad JSON" in out


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_damaged_gzip(tmp_path, tokenizer, name):
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    damaged = (b"no gzip", whole[:-10], whole[:20] + b"\0" * 20 + whole[40:])
    for content in damaged:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: damaged gzip file"):
            run([str(tmp_path / name)], tmp_path / "out", tokenizer)
        assert os.listdir(tmp_path) == [name]


def test_resolve_inputs(tmp_path):
    a, b = tmp_path / "a b.txt", tmp_path / "b.txt"
    a.write_text("a")
    b.write_text("b")
    (tmp_path / "list").write_text(f"{b}\n\n{a}\r\n{b}")
    assert resolve_inputs([str(a)], str(tmp_path / "list")) == [str(p) for p in (a, b, a, b)]
    odd = tmp_path / "c\x0cd\re\u2028f.txt"  # whose name holds what str.splitlines takes for an end
    odd.write_text("c")
    (tmp_path / "list").write_bytes(f"\ufeff{b}\r\n{odd}\n".encode())
    assert resolve_inputs([], str(tmp_path / "list")) == [str(b), str(odd)]
    (tmp_path / "list").write_text(f"{a}\n{tmp_path}/none\n")
    with pytest.raises(UserError, match="list:2: .*/none does not exist"):
        resolve_inputs([], str(tmp_path / "list"))
    with pytest.raises(UserError, match="--input: .*/none does not exist"):
        resolve_inputs([str(tmp_path / "none")])
    with pytest.raises(UserError, match="--input-list: .*/none does not exist"):
        resolve_inputs([], str(tmp_path / "none"))
    with pytest.raises(UserError, match="--input: .* is a directory"):
        resolve_inputs([str(tmp_path)])
    with pytest.raises(UserError, match="no input files"):
        resolve_inputs([])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="--input: .*pipe is not a regular file"):
        resolve_inputs([str(tmp_path / "pipe")])


def test_positions_end_at_the_size_of_all_files(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000))
    paths = [write_jsonl(tmp_path / "a.jsonl", TEXTS), str(tmp_path / "a.jsonl.gz")]
    positions = [document.position for document in read_documents(paths)]
    assert positions == sorted(positions)
    assert positions[-1] == sum(os.path.getsize(path) for path in paths)


def test_tokenizer_models_that_are_none(tmp_path):
    with pytest.raises(UserError, match="--tokenizer-model .*none: No such file"):
        load_sentencepiece(str(tmp_path / "none"))
    for content in (b"", b"not a model", b"\0" * 100):
        (tmp_path / "t.model").write_bytes(content)
        with pytest.raises(UserError, match=r"t\.model: not a sentencepiece model"):
            load_sentencepiece(str(tmp_path / "t.model"))


def test_number_of_workers_is_checked(tmp_path, tokenizer):
    with pytest.raises(UserError, match="--workers 0: must be at least 1"):
        run([__file__], tmp_path / "out", tokenizer, workers=0)


# Hugging Face tokenizers


def save_hugging_face(directory, words, **options):
    """Saves a word-level tokenizer; its special tokens have the last two ids, eos the last.

    Its file asks for truncation to two tokens, which must have no effect.
    """
    import tokenizers
    import transformers

    vocabulary = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<mask>", "</s>"])
    backend.enable_truncation(2)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", mask_token="<mask>", **options
    )
    fast.save_pretrained(directory)
    return load_hugging_face(str(directory))


WORDS = ["<unk>", "a", "b", "c"]


def test_hugging_face(tmp_path):
    tokenizer = save_hugging_face(tmp_path / "hf", WORDS, eos_token="</s>")
    texts = ["a b c a b c", "a <mask> </s> b", "b<mask>", " "]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    summary = run([source], tmp_path / "out", tokenizer, workers=2)
    # A special token in the text is a word that the tokenizer does not know.
    assert read(tmp_path / "out") == [[1, 2, 3, 1, 2, 3, 5], [1, 0, 0, 2, 5], [0, 5]]
    assert summary.empty_documents == 1


def test_special_tokens_in_text_are_asked_for_and_recorded(tmp_path, tokenizer):
    """Prompts that a template has rendered already, which generation encodes alike."""
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
    """A word of the vocabulary, and a piece that text may spell, which stay what they are."""
    words = save_hugging_face(tmp_path / "hf", [*WORDS, "[MASK]"], eos_token="</s>")
    assert words.mask == 5  # the declared one, <mask>, which no text spells
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
    """BERT's tokenizer has a sep token, and no eos token."""
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


# Output complete or absent


def test_existing_output_is_replaced_by_success_only(tmp_path, tokenizer, expected):
    (tmp_path / "old.bin").write_text("bin")
    (tmp_path / "old.idx").write_text("idx")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\nbad\n')
    with pytest.raises(UserError):
        run([str(bad)], tmp_path / "old", tokenizer)
    assert (tmp_path / "old.bin").read_text() + (tmp_path / "old.idx").read_text() == "binidx"
    run([write_jsonl(tmp_path / "a.jsonl", ["a"])], tmp_path / "old", tokenizer)
    assert read(tmp_path / "old") == expected(["a"])
    assert sorted(os.listdir(tmp_path)) == [
        "a.jsonl",
        "bad.jsonl",
        "old.bin",
        "old.idx",
        "old.json",
    ]


def test_output_is_kept_where_it_is_not_to_be_replaced(tmp_path, tokenizer, expected):
    """A training may have begun with it."""
    once = {"unless_done": True, "replace": False}
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    assert run([source], tmp_path / "out", tokenizer, **once).documents == 1
    assert run([source], tmp_path / "out", tokenizer, **once) is None
    write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    with pytest.raises(UserError, match=r"out.idx exists, and was made from other inputs or opti"):
        run([source], tmp_path / "out", tokenizer, **once)
    with pytest.raises(UserError, match=r"out.idx exists: give another --output-prefix, or rem"):
        run([source], tmp_path / "out", tokenizer, replace=False)
    assert read(tmp_path / "out") == expected(["a"])


def test_output_directory_is_made(tmp_path, tokenizer, expected):
    run([write_jsonl(tmp_path / "a.jsonl", ["a"])], tmp_path / "x" / "y" / "out", tokenizer)
    assert read(tmp_path / "x" / "y" / "out") == expected(["a"])


@pytest.mark.parametrize("target", ["out.bin", "out.idx"])
def test_target_that_cannot_be_replaced(tmp_path, tokenizer, target):
    (tmp_path / target).mkdir()
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(UserError, match=r"cannot write .*out\.bin: Is a directory"):
        run([source], tmp_path / "out", tokenizer)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", target]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_interruption_of_the_renaming_leaves_no_mixture(tmp_path, monkeypatch, renames):
    targets = [str(tmp_path / "p.bin"), str(tmp_path / "p.idx")]
    for target in targets:
        pathlib.Path(target).write_text("old")
    replace, done = os.replace, []

    def interrupted(source, target):
        if len(done) == min(renames, 1):
            if renames == 2:
                replace(source, target)
            raise KeyboardInterrupt
        done.append(replace(source, target))

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), complete_or_absent(*targets) as names:
        for name in names:
            pathlib.Path(name).write_text("new")
    assert os.listdir(tmp_path) == []


def test_full_disk(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", [SOURCE] * 20)
    (tmp_path / "out.idx").write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"^cannot write .*out\.bin: File too large$"):
            run([source], tmp_path / "out", tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out.idx"]
    assert (tmp_path / "out.idx").read_text() == "old"


def test_killed_worker_ends_the_run(tmp_path, tokenizer):
    block = gzip.compress(json.dumps({"text": SOURCE * 5}).encode() + b"\n")
    source = tmp_path / "big.jsonl.gz"
    source.write_bytes(block * 1000)

    def kill():
        while not (children := multiprocessing.active_children()):
            time.sleep(0.02)
        time.sleep(0.5)
        os.kill(children[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(UserError, match="a worker process ended by signal 9"):
        run([str(source)], tmp_path / "out", tokenizer, workers=2)
    killer.join()
    assert os.listdir(tmp_path) == ["big.jsonl.gz"]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_interruption_leaves_nothing(tmp_path, model, number, status):
    block = gzip.compress(json.dumps({"text": SOURCE * 5}).encode() + b"\n")
    (tmp_path / "big.jsonl.gz").write_bytes(block * 1000)  # half a GB
    process = subprocess.Popen(
        [sys.executable, str(TOOL), "--input", "big.jsonl.gz", "--tokenizer-model", str(model),
         "--output-prefix", "out", "--workers", "2"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What starts the tests may ignore the signal, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while not any(path.stat().st_size for path in tmp_path.glob("out.bin.tmp-*")):
        assert process.poll() is None
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as the terminal does
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == ["big.jsonl.gz"]
    wait_for_the_end_of_group(process.pid)


def wait_for_the_end_of_group(group):
    deadline = time.monotonic() + 30
    while any(p.status() != psutil.STATUS_ZOMBIE for p in members(group)):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.05)


def members(group):
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group:
                yield process
        except ProcessLookupError:
            pass


# Parts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_raises_and_is_restored(number):
    signal.signal(number, signal.SIG_DFL)  # nohup ignores one
    with pytest.raises(SystemExit) as status, termination_raises():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert status.value.code == 128 + number
    assert signal.getsignal(number) is signal.SIG_DFL


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with termination_raises():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def sleeper():
    def sleep(task):
        number, seconds = task
        time.sleep(seconds)
        return number

    return sleep


def test_workers_keep_the_order_and_take_few_tasks_in_advance():
    taken = []

    def tasks():
        for number in range(40):
            taken.append(number)
            yield number, 0.5 if number == 3 else 0.0

    with Workers(2, sleeper) as workers:
        for wanted, result in enumerate(workers.map(tasks())):
            assert result == wanted
            assert len(taken) <= wanted + 10
    assert len(taken) == 40


def raiser(error):
    def fail(_task):
        raise error

    return fail


def test_errors_of_workers_arrive():
    with (
        pytest.raises(UserError, match="^one line$"),
        Workers(1, raiser, UserError("one line")) as w,
    ):
        list(w.map([0]))
    with pytest.raises(RuntimeError, match="KeyError: 'x'"), Workers(1, raiser, KeyError("x")) as w:
        list(w.map([0]))
    with pytest.raises(RuntimeError, match="TypeError"), Workers(1, raiser) as w:
        list(w.map([0]))


def dier_within_a_message():
    def die(_connection, buffer):
        os.write(_connection.fileno(), bytes(buffer[:2]))
        os.kill(os.getpid(), signal.SIGKILL)

    def work(_task):
        multiprocessing.connection.Connection._send = die

    return work


def test_death_within_a_message_is_noticed():
    with pytest.raises(UserError, match="signal 9"), Workers(2, dier_within_a_message) as workers:
        list(workers.map([0, 0, 0]))


def test_workers_end_when_the_parent_is_killed():
    code = (
        "import functools, time\n"
        "from megatron_mdm.data.workers import Workers\n"
        "with Workers(2, functools.partial, time.sleep) as workers:\n"
        "    for _ in workers.map([0] * 2 + [1] * 100): print('x', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")])},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    process.stdout.readline()
    assert len(list(members(process.pid))) >= 3
    process.kill()
    process.wait()
    process.stdout.close()
    wait_for_the_end_of_group(process.pid)


def test_workers_import_nothing_large(model):
    code = (
        "import sys, megatron_mdm.data.tokenizer, benchmarks.preprocessing\n"
        "from megatron_mdm.data.load_tokenizer import load_sentencepiece\n"
        "load_sentencepiece(sys.argv[1]).load()('text')\n"
        "import tokenizers\n"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(model)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")])},
        check=True,
    )


# The command line


def test_tool(tmp_path, monkeypatch, capfd, model, expected):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "list").write_text(f"{tmp_path / 'a.jsonl'}\n")
    run_tool_here(
        monkeypatch, "--input-list", tmp_path / "list", "--tokenizer-model", model,
        "--output-prefix", tmp_path / "out", "--workers", 2,
    )  # fmt: skip
    documents = read(tmp_path / "out")
    assert documents == expected(TEXTS)
    out, err = capfd.readouterr()
    assert (
        f"out.bin, .idx, .json: 200 documents, {sum(map(len, documents)):,} tokens (uint16), "
        in out
    )
    for part in ("2 worker(s)", "tokens/s", "MB/s", "bytes per token", "skipped: 0 empty, 0 bad"):
        assert part in out
    # The progress bar alone, and it is short where there is no terminal.
    assert "docs/s" in err and "100%" in err
    assert err.count("\r") <= 4 and err.count("\n") == 1


def test_tool_with_hugging_face(tmp_path, monkeypatch, capfd):
    save_hugging_face(tmp_path / "hf", WORDS)
    source = write_jsonl(tmp_path / "a.jsonl", ["a b"])
    run_tool_here(
        monkeypatch, "--input", source, "--hf-tokenizer", tmp_path / "hf", "--no-append-eod",
        "--output-prefix", tmp_path / "out", "--workers", 1,
    )  # fmt: skip
    assert read(tmp_path / "out") == [[1, 2]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ignore-keys", "id"], "error: --ignore-keys is for --messages-key: leave it out\n"),
        (["--messages-key", "m", "--ignore-keys", "id", "role"], "--ignore-keys role: a convers"),
        (["--template-date", "2024-01-01"], "error: --template-date is for --messages-key: leave"),
        (["--messages-key", "m", "--template-date", "today"], "--template-date today: give YYYY"),
        (["--messages-key", "m", "--ignore-keys", "m"], "--ignore-keys m: a conversation cannot"),
    ],
)
def test_tool_refuses_flags_of_conversations_that_cannot_work(
    tmp_path, monkeypatch, capfd, flags, message
):
    save_hugging_face(tmp_path / "hf", WORDS, chat_template="{{ messages }}")
    source = write_jsonl(tmp_path / "a.jsonl", ["a b"])
    with pytest.raises(SystemExit):
        run_tool_here(
            monkeypatch, "--input", source, "--hf-tokenizer", tmp_path / "hf", "--no-append-eod",
            "--output-prefix", tmp_path / "out", *flags,
        )  # fmt: skip
    assert message in capfd.readouterr().err


def test_tool_reports_mistakes_in_one_line(tmp_path, monkeypatch, capfd, model):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(SystemExit) as status:
        run_tool_here(
            monkeypatch, "--input", source, "--tokenizer-model", model,
            "--output-prefix", tmp_path / "out", "--workers", 1,
        )  # fmt: skip
    assert status.value.code == 2
    _, err = capfd.readouterr()
    assert err.splitlines()[-1].startswith(f"error: {source}:2: the value of")
    assert "Traceback" not in err


def test_benchmark(tmp_path, monkeypatch, capsys):
    tool = TOOL.with_name("benchmark.py")

    def benchmark(*arguments):
        monkeypatch.setattr(sys, "argv", [str(tool), "data", *map(str, arguments)])
        runpy.run_path(str(tool), run_name="__main__")

    benchmark("--mb", 1, "--workers", 2, "--json", tmp_path / "data.json")
    results = json.loads((tmp_path / "data.json").read_text())
    assert results["identical_output"] is True
    assert results["text_bytes"] >= 1_000_000
    assert {len(side["seconds"]) for side in results["sides"].values()} == {3}
    assert f"ratio {results['ratio']:.2f} on " in capsys.readouterr().out
    with pytest.raises(SystemExit) as status:
        benchmark("--mb", "0.5")
    assert status.value.code == 2
