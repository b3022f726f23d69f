"""Training of a tokenizer: guarantees of the model, and files that a failure leaves."""

import gzip
import json
import os
import pathlib
import random
import runpy
import signal
import subprocess
import sys
import sysconfig
import time

import psutil
import pytest
import sentencepiece

from megatron_mdm.data.tokenizer import EOD_PIECE, MASK_PIECE, train_tokenizer
from megatron_mdm.errors import UserError
from tests import ROOT

TOOL = ROOT / "tools" / "train_tokenizer.py"
SOURCE = pathlib.Path(sysconfig.get_paths()["stdlib"]) / "argparse.py"


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model(request, tmp_path_factory):
    """A model trained on text in which "<mask>" is frequent."""
    directory = tmp_path_factory.mktemp(request.param)
    text = directory / "text.py"
    text.write_text(SOURCE.read_text().replace("self", "<mask>"))
    output = directory / "t.model"
    train_tokenizer([str(SOURCE), str(text)], str(output), vocab_size=600, model_type=request.param)
    return output


@pytest.fixture
def processor(model):
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def run_tool_here(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name="__main__")


def test_special_pieces(processor):
    assert processor.get_piece_size() == 600
    assert [processor.id_to_piece(i) for i in range(4)] == ["<pad>", "<eod>", "<unk>", "<mask>"]
    assert (processor.pad_id(), processor.eos_id(), processor.unk_id()) == (0, 1, 2)
    assert processor.bos_id() == -1
    assert processor.id_to_piece(processor.eos_id()) == EOD_PIECE
    assert processor.is_control(processor.piece_to_id(MASK_PIECE))


def test_megatron_finds_the_end_of_document(model):
    from megatron.core.tokenizers.text.libraries.sentencepiece_tokenizer import (
        SentencePieceTokenizer,
    )

    tokenizer = SentencePieceTokenizer(str(model))
    assert tokenizer.eod == 1
    assert tokenizer.pad_id == 0
    assert tokenizer.vocab_size == 600
    assert tokenizer.token_to_id(MASK_PIECE) == 3
    assert (
        tokenizer.ids_to_text(tokenizer.text_to_ids("\tif x:\n\t\ty  \n")) == "\tif x:\n\t\ty  \n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "def f(x):\n\tif x:\n\t\treturn  x\n\n\n    # end  \n",
        "\n\n leading and trailing \r\n\t ",
        "full-width \uff21, ligature \ufb01, a\u0301, no-break\u00a0space, \u3000, \u200b, \ufeff",
        "\x00\x01\x7f \U0001f600 \u4e2d\u6587 \U0010ffff",
        "<mask> <eod> <pad> <unk> </s> <s> <0x0A>",
    ],
)
def test_round_trip(processor, text):
    ids = processor.encode(text)
    assert processor.decode(ids) == text
    assert min(ids, default=4) >= 4


def test_round_trip_of_source_and_random_characters(processor):
    assert processor.decode(processor.encode(SOURCE.read_text())) == SOURCE.read_text()
    draw = random.Random(1)
    for limit in (0x80, 0x3000, 0x110000):
        codes = [draw.randrange(limit) for _ in range(3000)]
        text = "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000 and c != 0x2581)
        assert processor.decode(processor.encode(text)) == text


def test_text_never_encodes_to_the_mask(processor):
    mask = processor.piece_to_id(MASK_PIECE)
    for text in ("<mask>", "a<mask>b", " <mask> ", "<mask><mask>", "\n<mask>\n"):
        assert mask not in processor.encode(text)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_same_input_same_model(tmp_path, model_type):
    models = []
    for name in ("a.model", "b.model"):
        output = tmp_path / name
        train_tokenizer([str(SOURCE)], str(output), vocab_size=500, model_type=model_type)
        models.append(output.read_bytes())
    assert models[0] == models[1]


def test_all_formats_of_the_same_text_give_the_same_model(tmp_path):
    halves = SOURCE.read_text()[:40000], SOURCE.read_text()[40000:]
    lines = "".join(json.dumps({"body": half}) + "\n" for half in halves)
    (tmp_path / "1.py").write_text(halves[0])
    (tmp_path / "2.txt.gz").write_bytes(gzip.compress(halves[1].encode()))
    (tmp_path / "x.jsonl").write_text(lines)
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(lines.encode()))
    models = set()
    for inputs in (["1.py", "2.txt.gz"], ["x.jsonl"], ["x.json.gz"]):
        output = tmp_path / "t.model"
        paths = [str(tmp_path / name) for name in inputs]
        summary = train_tokenizer(paths, str(output), vocab_size=500, json_key="body")
        assert summary.documents == 2
        assert summary.text_bytes == summary.used_bytes == len("".join(halves).encode())
        models.add(output.read_bytes())
    assert len(models) == 1


def test_sample_respects_the_limit_and_is_repeatable(tmp_path):
    models = set()
    for _ in range(2):
        summary = train_tokenizer(
            [str(SOURCE)], str(tmp_path / "t.model"), vocab_size=400, max_bytes=20000
        )
        assert 19000 < summary.used_bytes <= 20000 < summary.text_bytes
        assert "a sample of" in str(summary)
        models.add((tmp_path / "t.model").read_bytes())
    assert len(models) == 1


def test_a_document_in_one_long_line_is_not_lost(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(f"word{i % 97}" for i in range(20000)))
    summary = train_tokenizer([str(tmp_path / "a.txt")], str(tmp_path / "t.model"), vocab_size=300)
    assert summary.used_bytes > 100000


def test_tool_prints_one_line_and_replaces_the_output(tmp_path, monkeypatch, capfd):
    output = tmp_path / "new" / "t.model"
    output.parent.mkdir()
    output.write_text("old")
    run_tool_here(monkeypatch, "--input", SOURCE, "--output", output, "--vocab-size", 400)
    out, err = capfd.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    assert out.startswith(f"{output}: 400 pieces (eod 1, mask 3) from ")
    assert sorted(os.listdir(output.parent)) == ["t.model", "t.model.json"]
    assert sentencepiece.SentencePieceProcessor(model_file=str(output)).get_piece_size() == 400


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], "--input: {input} does not exist"),
        ("", [], "--input: no text to train on in 1 file(s)"),
        ("abc abd " * 50, ["--vocab-size", "5000"], "--vocab-size 5000: too large"),
        ("abc abd " * 50, ["--vocab-size", "100"], "--vocab-size 100: too small"),
        ("abc", ["--vocab-size", "0"], "--vocab-size 0: "),
        ("abc", ["--max-bytes", "0"], "--max-bytes 0: must be at least 1"),
        ('{"text": "a"}\n{"text": 1}\n', ["--format", "jsonl"], "{input}:2: the value of"),
    ],
)
def test_mistakes_are_one_line_and_keep_the_old_output(
    tmp_path, monkeypatch, capfd, content, options, message
):
    source, output = tmp_path / "in.txt", tmp_path / "t.model"
    if content is not None:
        source.write_text(content)
    output.write_text("old")
    with pytest.raises(SystemExit) as status:
        run_tool_here(monkeypatch, "--input", source, "--output", output, *options)
    assert status.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: " + message.format(input=source))
    assert output.read_text() == "old"
    assert set(os.listdir(tmp_path)) <= {"in.txt", "t.model"}


def test_the_sizes_that_errors_suggest_work(tmp_path):
    text, output = tmp_path / "a.txt", str(tmp_path / "t.model")
    text.write_text("\n".join(f"some words {i}" for i in range(100)))
    for size in (100_000, 50):
        with pytest.raises(UserError, match=f"--vocab-size {size}: too ") as error:
            train_tokenizer([str(text)], output, vocab_size=size)
        suggestion = next(int(w) for w in str(error.value).split()[3:] if w.isdigit())
        summary = train_tokenizer([str(text)], output, vocab_size=suggestion)
        assert summary.vocab_size == suggestion


def test_a_model_is_kept_unless_something_has_changed(tmp_path, monkeypatch, capfd):
    source, output = tmp_path / "a.txt", tmp_path / "t.model"
    source.write_text("some words\n" * 9)

    def is_trained(*options):
        before = output.read_bytes() if output.exists() else None
        run_tool_here(
            monkeypatch, "--input", source, "--output", output, "--unless-done",
            "--vocab-size", 270, *options,
        )  # fmt: skip
        said = capfd.readouterr().out
        if said == f"{output}: already made from these inputs and options\n":
            assert output.read_bytes() == before
            return False
        assert "pieces" in said
        return True

    assert is_trained() and not is_trained()
    source.write_text("other words\n" * 9)
    assert is_trained() and not is_trained()
    for options in (["--vocab-size", 271], ["--model-type", "unigram"], ["--max-bytes", 90]):
        assert is_trained(*options) and not is_trained(*options)
    output.write_bytes(output.read_bytes()[:-1])
    assert is_trained("--max-bytes", 90)
    output.unlink()
    assert is_trained("--max-bytes", 90)
    (tmp_path / "t.model.json").write_text('{"text": "of mine"}')
    with pytest.raises(UserError, match="t.model.json is where the record of the output goes, and"):
        train_tokenizer([str(source)], str(output))


def test_output_must_be_named_like_a_model(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("{}")
    with pytest.raises(UserError, match="--output .*corpus.jsonl: must end in .model"):
        train_tokenizer([str(SOURCE)], str(corpus))
    assert corpus.read_text() == "{}"


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*/file: File exists"):
        train_tokenizer([str(SOURCE)], str(tmp_path / "file" / "t.model"), vocab_size=400)


def test_bad_lines_can_be_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "abc abd"}\n{"text": "\\ud800"}\n\n{"text": "ab"}')
    summary = train_tokenizer(
        [str(tmp_path / "a.jsonl")], str(tmp_path / "t.model"), vocab_size=266, skip_bad_lines=True
    )
    assert (summary.documents, summary.bad_documents) == (2, 1)


def test_ctrl_c_leaves_nothing(tmp_path):
    block = gzip.compress(SOURCE.read_bytes() * 10)
    (tmp_path / "big.txt.gz").write_bytes(block)
    source = tmp_path / "list.txt"
    source.write_text(f"{tmp_path / 'big.txt.gz'}\n" * 300)  # a GB
    process = subprocess.Popen(
        [sys.executable, str(TOOL), "--input-list", str(source), "--output", "t.model"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # The process that starts the tests may ignore the signal, and children inherit this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    parent = psutil.Process(process.pid)
    while not any("spawn_main" in " ".join(c.cmdline()) for c in parent.children()):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)  # until it reads
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted\n"
    assert sorted(os.listdir(tmp_path)) == ["big.txt.gz", "list.txt"]
