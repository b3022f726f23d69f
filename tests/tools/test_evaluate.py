"""tools/evaluate.py on a checkpoint: every kind of input and layout gives the same number."""

import gzip
import json
import math
import re
import runpy
import subprocess
import sys
from argparse import Namespace

import pytest

from megatron_mdm.evaluation.nelbo import Estimate, Evaluation
from tests import ROOT, ranks

COUNTS = ("num_tokens", "num_documents")


def evaluate(base, data, *flags, count=1):
    tool = ["tools/evaluate.py", "--device", "cpu", "--load", base[base.index("--load") + 1]]
    tool += ["--data", str(data), *flags]
    if count == 1:
        return ranks.run_forked(*tool)
    command = [sys.executable, *ranks.TORCHRUN, *tool]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """The same documents as JSONL, as compressed JSONL, and as .bin/.idx."""
    directory = tmp_path_factory.mktemp("held_out")
    texts = ranks.random_documents(400, seed=1)
    lines = [json.dumps({"words": " ".join(map(str, text[:-1]))}) + "\n" for text in texts]
    (directory / "text.jsonl").write_text("".join(lines))
    (directory / "text.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    ranks.write_documents(directory / "text", texts)
    return directory


def test_files_indexed_data_and_layouts_give_one_number(base, documents, tmp_path):
    results = []
    for name, data, count in (
        ("jsonl", documents / "text.jsonl", 1),
        ("gz", documents / "text.jsonl.gz", 1),
        ("bin", documents / "text", 1),
        ("tensor parallel", documents / "text", 2),
    ):
        path = tmp_path / f"{name}.json"
        flags = ["--json-key", "words", "--rows", "20", "--draws", "4", "--json", str(path)]
        run = evaluate(base, data, *flags, count=count)
        assert run.returncode == 0, run.stderr[-2000:]
        start = re.match(r"(\d+) tokens in 20 rows of (\d+) documents, 4 masks", run.stdout)
        results.append(json.loads(path.read_text()))
        assert [int(n) for n in start.groups()] == [results[0][n] for n in COUNTS]
        assert [results[-1][n] for n in COUNTS] == [results[0][n] for n in COUNTS]
    for result in results:
        edges = [(one["low"], one["high"]) for one in result["bins"]]
        assert edges == [(i / 10, (i + 1) / 10) for i in range(10)]
        assert result["nelbo"] == pytest.approx(results[0]["nelbo"], rel=1e-5)
        assert result["bins"][9]["value"] == pytest.approx(results[0]["bins"][9]["value"], rel=1e-5)
    assert 19 * 32 < results[0]["num_tokens"] <= 20 * 32
    # In 20 steps the model has learnt which ids occur.
    assert 2.0 < results[0]["nelbo"]["value"] < math.log(128)
    assert 0 < results[0]["nelbo"]["draw_stderr"] < results[0]["nelbo"]["stderr"] < 0.5


def test_rows_are_drawn_from_all_over_the_data(base, tmp_path):
    """Documents are sorted by topic. The first tenth is easy and does not represent the others."""
    easy, hard = [[*[7] * 60, ranks.EOD_ID]] * 30, ranks.random_documents(600, seed=3)
    ranks.write_documents(tmp_path / "mixed", [*easy, *hard])
    ranks.write_documents(tmp_path / "hard", hard)
    values = {}
    for name, seed in (("mixed", 0), ("mixed", 1), ("hard", 0)):
        path = tmp_path / f"{name}{seed}.json"
        flags = ["--rows", "40", "--draws", "2", "--seed", str(seed), "--json", str(path)]
        assert evaluate(base, tmp_path / name, *flags).returncode == 0
        values[name, seed] = json.loads(path.read_text())
    for seed in (0, 1):
        assert 40 <= values["mixed", seed]["num_documents"] < 140
        one, other = (values[key]["nelbo"] for key in (("mixed", seed), ("hard", 0)))
        assert abs(one["value"] - other["value"]) < 4 * (one["stderr"] + other["stderr"])
    assert values["mixed", 0]["nelbo"] != values["mixed", 1]["nelbo"]


def test_rows_of_one_text_have_no_error_over_documents(base, tmp_path):
    """The end of this text differs from its beginning, so all of it must be sampled."""
    text = " ".join(["7"] * 1000 + [str(3 + i % 100) for i in range(9000)])
    (tmp_path / "book.txt").write_text(text)
    path = tmp_path / "book.json"
    run = evaluate(base, tmp_path / "book.txt", "--rows", "20", "--draws", "2", "--json", str(path))
    result = json.loads(path.read_text())
    assert "in 20 rows of 1 documents" in run.stdout and result["num_documents"] == 1
    assert "its error over the choice of documents is unknown: it takes rows of" in run.stdout
    assert result["nelbo"]["stderr"] is None and result["nelbo"]["draw_stderr"] > 0
    assert result["nelbo"]["value"] > 2  # the first rows alone are below 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--draws", "3"], "--draws must be even"),
        (["--rows", "0"], "must be at least 1"),
        (["--seed", "-1"], "--seed -1: must not be negative"),
    ],
)
def test_bad_input_is_one_line(base, documents, flags, message):
    run = evaluate(base, documents / "text.jsonl", *flags)
    assert run.returncode == 2
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in run.stderr


def test_missing_data_is_one_line(base, tmp_path):
    run = evaluate(base, tmp_path / "absent")
    assert run.returncode == 2
    assert "absent.bin does not exist" in run.stderr


def test_results_are_written_before_they_are_printed(tmp_path, monkeypatch):
    """A print may fail after hours of work: a terminal may lack a letter of the table."""
    monkeypatch.setattr("builtins.print", lambda *_: 1 / 0)
    tool = runpy.run_path(str(ROOT / "tools/evaluate.py"))
    paths = {name: str(tmp_path / name) for name in ("json", "log_samples")}
    options = Namespace(**paths, seed=0)
    nelbo = Estimate(1.5, 0.1, 0.1)
    with pytest.raises(ZeroDivisionError):
        tool["report"](options, Evaluation(nelbo, [nelbo], 2, 2, 10, 4), None, None)
    assert json.loads((tmp_path / "json").read_text())["nelbo"]["value"] == 1.5

    pytest.importorskip("lm_eval", reason="lm_eval is not installed: [eval]")
    names = ("results", "versions", "n-shot", "higher_is_better")
    results = {**{name: {} for name in names}, "samples": {"a": [{"doc_id": 3}]}}
    with pytest.raises(ZeroDivisionError):
        tool["report_answers"](options, results)
    assert json.loads((tmp_path / "json").read_text())["versions"] == {}
    assert json.loads((tmp_path / "log_samples").read_text()) == {"task": "a", "doc_id": 3}
