"""The reproduction in small: its problems, its accounting, and the whole of it at --scale ci."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from megatron_mdm.benchmarks.runs import as_flags, kept
from megatron_mdm.errors import UserError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples/reproduce"))

import reproduce  # noqa: E402
from problems import LARGEST, answer, problems  # noqa: E402

RUNS = [
    {"method": "standard", "seed": 1, "epochs": False, "accuracy": 0.5, "nelbo": 1.0},
    {"method": "standard", "seed": 2, "epochs": False, "accuracy": 0.6, "nelbo": 2.0},
    {"method": "MIRROR", "seed": 1, "epochs": False, "accuracy": 0.25, "nelbo": 3.0},
    {"method": "MIRROR", "seed": 1, "epochs": True, "accuracy": 0.75, "nelbo": 0.5},
]
RUNS = [run | {"gradient_norm": 1.0, "rows": 32 * (1 + run["epochs"])} for run in RUNS]


def test_every_step_and_every_answer_is_right():
    for problem in problems(500, (1, 2, 3), 0):
        *steps, end = problem.response.split(" ; ")
        said = re.findall(
            r"has (\d+)|(finds|buys|gets|wins) (\d+)|(?:\w+) (\d+) [.]", problem.prompt
        )
        value = int(said[0][0])
        assert len(steps) == len(said) - 1 in (1, 2, 3)
        for step, (_, gain, plus, minus) in zip(steps, said[1:], strict=True):
            change = int(plus) if gain else -int(minus)
            assert step == f"{value} {'+' if gain else '-'} {abs(change)} = {value + change}"
            value += change
            assert 0 <= value <= LARGEST
        assert end == f"# {value}"
        assert answer(problem.response) == str(value)
    assert answer("12 + 3 = 15") is None


def test_problems_follow_from_the_seed_and_held_out_ones_stay_out():
    tests = problems(200, (2,), 3)
    prompts = {problem.prompt for problem in tests}
    assert tests == problems(200, (2,), 3) and len(prompts) == 200
    assert not prompts & {p.prompt for p in problems(2000, (2,), 3, prompts)}


def test_tables_of_both_accountings():
    text = reproduce.as_text(RUNS)
    rows, epochs = text.split("\n\n")
    cells = {line[:20].strip(): line[20:].split() for line in rows.splitlines()[1:]}
    assert cells["standard"] == ["55.0%", "10.0", "7.1", "1.5000", "1.000", "32", "2"]
    assert cells["MIRROR"] == ["25.0%", "-", "-", "3.0000", "1.000", "32", "1"]
    cells = {line[:20].strip(): line[20:].split() for line in epochs.splitlines()[1:]}
    assert cells["standard"][0] == "55.0%"
    assert cells["MIRROR"] == ["75.0%", "-", "-", "0.5000", "1.000", "64", "1"]


def test_only_methods_of_several_views_run_twice():
    tasks = reproduce.tasks(reproduce.SCALES["laptop"])
    assert len(tasks) == len(set(tasks)) == 3 * (12 + 2)
    assert {m for m, _, epochs in tasks if epochs} == {
        "MIRROR",
        "P-POTS + MIRROR",
        reproduce.DOUBLED,
    }
    # One seed is complete, but for two controls, before the next one begins.
    seeds = [seed for m, seed, _ in tasks if m not in (reproduce.DOUBLED, "EMA")]
    assert seeds == sorted(seeds, key=reproduce.SEEDS.index) and len(seeds) == 36


def test_a_run_is_kept_and_a_failed_one_leaves_nothing(tmp_path):
    calls = []

    def work(path):
        calls.append(path)
        if len(calls) == 1:
            raise UserError("failed")
        return {"value": len(calls)}

    flags = as_flags({"mdm_views": 2, "mdm_clip": [0.3, 0.8]})
    assert flags == ["--mdm-views", "2", "--mdm-clip", "0.3", "0.8"]
    with pytest.raises(UserError):
        kept(tmp_path, flags, work)
    assert not list(tmp_path.iterdir())
    assert kept(tmp_path, flags, work) == kept(tmp_path, flags, work)
    assert len(calls) == 2
    assert kept(tmp_path, flags[:2], work)["value"] == 3


def study(directory, *flags):
    command = [sys.executable, "examples/reproduce/reproduce.py", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.timeout(1800)
def test_the_whole_study_makes_its_table_and_goes_on_where_it_was(tmp_path):
    flags = ["--scale", "ci", "--directory", str(tmp_path), "--json", str(tmp_path / "all.json")]
    run = study(tmp_path, *flags, "--figure", str(tmp_path / "table.png"))
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads((tmp_path / "all.json").read_text())
    assert [(r["method"], r["epochs"], r["rows"]) for r in results] == [
        ("standard", False, 320),
        ("MIRROR", False, 320),
        ("autoregressive", False, 320),
        ("MIRROR", True, 640),
    ]
    for result in results:
        assert 0 < result["nelbo"] < 6.2 and result["gradient_norm"] > 0
        assert 0 <= result["accuracy"] <= 1 and len(result["examples"]) == 3
    assert (tmp_path / "table.png").stat().st_size > 5000
    words = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "ci/words.model"))
    for word in reproduce.DELIMITERS + reproduce.STRUCTURE:
        assert words.piece_to_id(f"\u2581{word}") != words.unk_id(), word
    kept_before = {path: path.stat().st_mtime_ns for path in (tmp_path / "ci").glob("*.json")}
    assert len(kept_before) == 6  # with two pretrainings
    assert not list((tmp_path / "ci").glob("*.checkpoint"))
    again = study(tmp_path, *flags)
    assert again.stdout == run.stdout and not again.stderr
    assert kept_before == {p: p.stat().st_mtime_ns for p in (tmp_path / "ci").glob("*.json")}
    report = study(tmp_path, "--report", str(tmp_path / "all.json"))
    assert report.stdout == run.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --scale to train, or --report FILE"),
        (["--report", "nowhere.json"], "--report nowhere.json: cannot be read"),
        (["--scale", "ci", "--figure", "x.pdf"], "must end in .png or .svg"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, message):
    run = study(tmp_path, *flags)
    assert run.returncode == 2
    assert message in run.stderr and len(run.stderr.splitlines()) == 1
