"""The record beside a .bin/.idx pair: its contents, when it is trusted, when work is skipped."""

import dataclasses
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mdm.data import identity
from megatron_mdm.data.documents import InputsDigest, read_documents
from megatron_mdm.data.fingerprint import fingerprint
from megatron_mdm.data.identity import data_identity, quick_digest
from megatron_mdm.data.load_tokenizer import load_sentencepiece
from megatron_mdm.data.pairs import PairKeys
from megatron_mdm.data.preprocess import preprocess
from megatron_mdm.data.tokenizer import train_tokenizer
from megatron_mdm.errors import UserError
from megatron_mdm.files import complete_or_absent
from tests import ROOT, ranks

TEXT = "Words and more words, of which some come again and again.\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "a.txt").write_text(TEXT * 20)
    train_tokenizer([str(directory / "a.txt")], str(directory / "t.model"), vocab_size=300)
    return load_sentencepiece(str(directory / "t.model"))


def make(directory, tokenizer, lines=("one", "two"), **options):
    source = directory / "in.jsonl"
    source.write_text("".join(json.dumps({"text": x, "response": x}) + "\n" for x in lines))
    options = {"workers": 1, "progress": False} | options
    return preprocess([str(source)], str(directory / "out"), tokenizer, **options)


def contents(directory):
    return {
        suffix: (directory / f"out{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")
    }


def test_the_record_says_what_was_made_of_what(tmp_path, tokenizer):
    make(tmp_path, tokenizer, command=["preprocess_data.py", "--input", "in.jsonl"])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["command"] == ["preprocess_data.py", "--input", "in.jsonl"]
    assert (found["kind"], found["documents"], found["refused_mask"]) == ("text", 2, 3)
    assert found["tokenizer"] == dataclasses.asdict(fingerprint(tokenizer))
    for name, of_file in found["files"].items():
        output = subprocess.run(["sha256sum", tmp_path / f"out.{name}"], capture_output=True)
        assert output.stdout.split()[0].decode() == of_file["sha256"]
    known = data_identity(str(tmp_path / "out"))
    assert known.quick == quick_digest(str(tmp_path / "out.bin"), str(tmp_path / "out.idx"))
    assert (known.kind, known.special_tokens, known.template_date) == ("text", False, None)
    assert json.loads(json.dumps(dataclasses.asdict(known))) == dataclasses.asdict(known)


def test_a_copy_is_the_same_data_and_a_pair_without_a_record_is_known_by_its_files(
    tmp_path, tokenizer
):
    make(tmp_path, tokenizer)
    (tmp_path / "copy").mkdir()
    for suffix in (".bin", ".idx", ".json"):
        shutil.copyfile(tmp_path / f"out{suffix}", tmp_path / "copy" / f"text{suffix}")
        os.utime(tmp_path / "copy" / f"text{suffix}", (1, 1))
    known = data_identity(str(tmp_path / "out"))
    assert data_identity(str(tmp_path / "copy/text")) == known and known.full is not None
    (tmp_path / "copy/text.json").unlink()
    assert data_identity(str(tmp_path / "copy/text")) == identity.Identity(known.quick)


def test_the_same_command_writes_the_same_record(tmp_path, tokenizer):
    make(tmp_path, tokenizer)
    first = contents(tmp_path)
    make(tmp_path, tokenizer, workers=2)
    assert contents(tmp_path) == first


def test_a_record_beside_files_that_were_replaced_is_not_trusted(tmp_path, tokenizer):
    make(tmp_path, tokenizer)
    known = data_identity(str(tmp_path / "out"))
    ranks.write_documents(tmp_path / "out", ranks.random_documents(3))
    replaced = data_identity(str(tmp_path / "out"))
    assert replaced == identity.Identity(replaced.quick) and replaced.quick != known.quick


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 99, "made_by": "x"}', "\0\xff"])
def test_another_file_in_the_place_of_the_record_is_none(tmp_path, content):
    ranks.write_documents(tmp_path / "out", ranks.random_documents(3))
    (tmp_path / "out.json").write_text(content)
    known = data_identity(str(tmp_path / "out"))
    assert known == identity.Identity(known.quick)


@pytest.mark.parametrize("size", [0, 1, 100, 3 << 20, 5 << 20])
def test_the_quick_digest_covers_sizes_index_and_three_parts(tmp_path, size):
    tokens, index = tmp_path / "a.bin", tmp_path / "a.idx"
    tokens.write_bytes(bytes(size))
    index.write_bytes(bytes(3 << 20))

    def changed(path, place):
        before = path.read_bytes()
        path.write_bytes(before[:place] + b"x" + before[place + 1 :])
        found = quick_digest(str(tokens), str(index))
        path.write_bytes(before)
        return found

    found = [quick_digest(str(tokens), str(index))]
    found += [changed(index, place) for place in (0, 1 << 20, (3 << 20) - 1)]
    if size:
        found += [changed(tokens, place) for place in {0, size // 2, size - 1}]
    tokens.write_bytes(bytes(size + 1))
    found.append(quick_digest(str(tokens), str(index)))
    assert len(set(found)) == len(found)


def test_files_that_are_missing_are_named(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.bin: No such file"):
        data_identity(str(tmp_path / "none"))
    (tmp_path / "none.bin").write_bytes(b"")
    with pytest.raises(UserError, match="cannot read .*none.idx: No such file"):
        data_identity(str(tmp_path / "none"))


def test_no_other_file_is_replaced_by_a_record(tmp_path, tokenizer):
    source = tmp_path / "corpus.json"
    source.write_text('{"text": "a"}\n')
    with pytest.raises(
        UserError, match="--output-prefix .*corpus: .*corpus.json is where the record"
    ):
        preprocess([str(source)], str(tmp_path / "corpus"), tokenizer, workers=1, progress=False)
    assert os.listdir(tmp_path) == ["corpus.json"]


def test_what_is_done_is_kept_and_what_has_changed_is_made_anew(tmp_path, tokenizer):
    def is_made(**options):
        before = contents(tmp_path) if (tmp_path / "out.idx").exists() else None
        summary = make(tmp_path, tokenizer, unless_done=True, **options)
        assert (summary is None) == (contents(tmp_path) == before)
        return summary is not None

    assert is_made()
    assert not is_made() and not is_made(workers=2)
    assert is_made(lines=["one", "three"])
    for options in (
        {"append_eod": False},
        {"json_key": "response"},
        {"pairs": PairKeys(prompt="text")},
        {"pairs": PairKeys(prompt="response")},
        {"skip_bad_lines": True},
        {"file_format": "text"},
    ):
        assert is_made(**options) and not is_made(**options)
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"out{suffix}").unlink()
        assert make(tmp_path, tokenizer, unless_done=True) is not None
    ranks.write_documents(tmp_path / "out", ranks.random_documents(3))
    assert make(tmp_path, tokenizer, unless_done=True) is not None
    other = dataclasses.replace(tokenizer, eod=0)
    assert make(tmp_path, other, unless_done=True) is not None


def test_an_interruption_leaves_no_record_of_other_files(tmp_path, monkeypatch):
    """The interruption is between the removal of the old index and the creation of the new one."""
    names = [str(tmp_path / f"out{suffix}") for suffix in (".bin", ".json", ".idx")]
    for name in names:
        Path(name).write_text("old")
    replace, done = os.replace, []

    def interrupted(source, target):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), complete_or_absent(*names) as temporary:
        for name in temporary:
            Path(name).write_text("new")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("file_format", ["auto", "text"])
def test_the_digest_of_inputs_is_that_of_what_is_read(tmp_path, file_format):
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.txt.gz", "c")]
    line = json.dumps({"text": TEXT}) + "\n"
    Path(paths[0]).write_text(line * 20_000)
    Path(paths[1]).write_bytes(gzip.compress(line.encode() * 20_000) + bytes(1000))
    Path(paths[2]).write_text("")
    digest = InputsDigest()
    documents = list(read_documents(paths, file_format, digest))
    assert len(documents) == (40_000 if file_format == "auto" else 2) + 1
    assert digest.hex() == InputsDigest().read(paths)
    os.rename(paths[0], tmp_path / "other.jsonl")
    others = [str(tmp_path / "other.jsonl"), *paths[1:]]
    assert InputsDigest().read(others) == digest.hex()
    os.rename(paths[2], tmp_path / "c.json")  # this name means another format
    assert InputsDigest().read([*others[:2], str(tmp_path / "c.json")]) != digest.hex()


def test_reading_a_record_needs_neither_torch_nor_megatron(tmp_path):
    ranks.write_documents(tmp_path / "out", ranks.random_documents(3))
    code = (
        "import sys\n"
        "from megatron_mdm.data.identity import data_identity\n"
        "data_identity(sys.argv[1])\n"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], env=environment, check=True)
