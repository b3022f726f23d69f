"""Preprocessing gives exact tokens, equal for every number of workers."""

import gzip
import json

import pytest
import sentencepiece

from megatron_mdm.data import preprocess as module
from megatron_mdm.data.documents import read_documents
from megatron_mdm.data.load_tokenizer import load_sentencepiece
from megatron_mdm.errors import UserError
from tests.data.texts import TEXTS, read, run, write_jsonl


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
