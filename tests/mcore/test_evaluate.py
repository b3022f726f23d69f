"""tools/evaluate.py on a checkpoint: one number from every kind of input and layout."""

import json
import math
import subprocess
import sys

import pytest

from tests import ranks

ROOT = ranks.Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def evaluate(base, data, *flags, ranks=1):
    command = [sys.executable, *(TORCHRUN if ranks > 1 else []), "tools/evaluate.py"]
    command += ["--device", "cpu", "--load", base[base.index("--load") + 1], "--data", str(data)]
    return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """The same documents as JSONL and as .bin/.idx."""
    directory = tmp_path_factory.mktemp("held_out")
    texts = ranks.random_documents(40, seed=1)
    lines = [json.dumps({"words": " ".join(map(str, text[:-1]))}) + "\n" for text in texts]
    (directory / "text.jsonl").write_text("".join(lines))
    ranks.write_documents(directory / "text", texts)
    return directory


def test_files_indexed_data_and_layouts_give_one_number(base, documents, tmp_path):
    results = []
    for name, data, count in (
        ("jsonl", documents / "text.jsonl", 1),
        ("bin", documents / "text", 1),
        ("tensor parallel", documents / "text", 2),
    ):
        path = tmp_path / f"{name}.json"
        flags = ["--json-key", "words", "--rows", "20", "--draws", "4", "--json", str(path)]
        run = evaluate(base, data, *flags, ranks=count)
        assert run.returncode == 0, run.stderr[-2000:]
        assert run.stdout.startswith("640 tokens in 20 rows, 4 masks each\nNELBO ")
        results.append(json.loads(path.read_text()))
    for result in results:
        assert result["nelbo"] == pytest.approx(results[0]["nelbo"], rel=1e-5)
        assert result["bins"][9]["value"] == pytest.approx(results[0]["bins"][9]["value"], rel=1e-5)
    # 20 steps have taught it which ids there are.
    assert 2.0 < results[0]["nelbo"]["value"] < math.log(128)
    assert 0 < results[0]["nelbo"]["draw_stderr"] < results[0]["nelbo"]["stderr"] < 0.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--draws", "3"], "--draws must be even"),
        (["--rows", "0"], "must be at least 1"),
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
