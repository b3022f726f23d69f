"""tools/preprocess_data.py: its flags, its output, and its one-line errors."""

import pytest

from tests.data.texts import (
    TEXTS,
    WORDS,
    read,
    run_tool_here,
    save_hugging_face,
    write_jsonl,
)


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
    # stderr has only the progress bar, which is short without a terminal.
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
        (["--turns", "every"], "error: --turns is for --messages-key: leave it out\n"),
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
