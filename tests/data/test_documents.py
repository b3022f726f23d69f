"""Documents of input files: bad documents are named by their place, or skipped and counted."""

import gzip
import json
import os

import pytest

from megatron_mdm.data import preprocess as module
from megatron_mdm.data.documents import read_documents, resolve_inputs
from megatron_mdm.data.load_tokenizer import load_sentencepiece
from megatron_mdm.errors import UserError
from tests.data.texts import SOURCE, TEXTS, read, run, run_tool_here, write_jsonl

BAD_LINES = [
    (b'{"text": "a"', "bad JSON: Expecting ',' delimiter (column 13)"),
    (b" {", "the object continues on the next line: write one object a line (jq -c . does)"),
    (b"text", "bad JSON: Expecting value (column 1)"),
    (b"[" * 100_000, "bad JSON: maximum recursion depth exceeded"),
    (b'{"text": ' + b"1" * 5000 + b"}", "bad JSON: Exceeds the limit (4300 digits)"),
    (b'["a"]', "a JSON array where an object is needed"),
    (b'{"txt": "a"}', 'no key "text" (see --json-key)'),
    (b'{"text": null}', 'the value of "text" is a JSON null, not a string'),
    (b'{"text": 1}', 'the value of "text" is a JSON number, not a string'),
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
    assert str(error.value).endswith("; fix it or pass --skip-bad-lines")
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
    odd = tmp_path / "c\x0cd\re\u2028f.txt"  # str.splitlines splits this name
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
