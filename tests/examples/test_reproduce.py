"""The reproduction in small: its problems, its accounting, and the whole of it at --scale ci."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece
import torch

from megatron_mdm.checkpoint import open_checkpoint
from megatron_mdm.errors import UserError
from megatron_mdm.experiments.runs import as_flags, run_cached, run_parallel, run_python
from megatron_mdm.recipes import METHODS
from tests import ROOT, ranks, tiers

EXAMPLE = ROOT / "examples/reproduce"
sys.path.insert(0, str(EXAMPLE))

import methods  # noqa: E402
import reproduce  # noqa: E402
import tables  # noqa: E402
from methods import ALL, DOUBLED, LONGER, SCALES, Task  # noqa: E402
from problems import LARGEST, answer, problems  # noqa: E402
from study import LENGTH, Study  # noqa: E402

COMMITTED = EXAMPLE / "results/laptop.json"


def run(method, seed, answers, nelbo=1.0, epochs=False, **more):
    numbers = {"answers": answers, "solutions": answers / 2, "nelbo": nelbo}
    rest = {"rows": 32 * (1 + epochs), "problems": 20, "seconds": 1800.0}
    return {"method": method, "seed": seed, "epochs": epochs, **numbers, **rest, **more}


# Differences of answers: clipped 10, 12, 14 points, SyRM -20 and -40, EMA none.
RESULTS = {
    **{"scale": "ci", "machine": "a machine", "date": "2026-01-01", "jobs": 2},
    "runs": [
        *(run("standard", seed, 0.1 * seed, 0.5, noise={}) for seed in (3, 4, 5)),
        *(run("clipped", seed, 0.1 * seed + 0.02 * seed + 0.04, 0.4) for seed in (5, 4, 3)),
        *(run("SyRM", seed, 0.1 * seed + x) for seed, x in ((3, -0.2), (4, -0.4))),
        *(run("EMA", seed, 0.1 * seed, 0.5) for seed in (3, 4, 5)),
        run("MIRROR", 3, 0.25, 3.0),
        run("MIRROR", 3, 0.75, 0.5, epochs=True),
        run(DOUBLED, 3, 0.5, 0.5),
    ],
}
for r, ratio in zip(RESULTS["runs"], (0.5, 0.6, 0.7), strict=False):
    r["noise"] = {"standard": 1.0, "clipped": ratio, DOUBLED: 0.5, "MIRROR, equal epochs": 0.6}


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
        assert len(f"{problem.prompt} {problem.response}".split()) < LENGTH  # room for its end
    assert answer("12 + 3 = 15") is None


def test_problems_follow_from_the_seed_and_held_out_ones_stay_out():
    tests = problems(200, (2,), 3)
    prompts = {problem.prompt for problem in tests}
    assert tests == problems(200, (2,), 3) and len(prompts) == 200
    assert not prompts & {p.prompt for p in problems(2000, (2,), 3, prompts)}


def test_intervals_are_students_and_verdicts_follow_from_them():
    estimate = tables.Estimate.of([1.0, 2.0, 3.0])
    # 97.5% of t with 2 degrees of freedom lie below 4.303 (any table).
    assert estimate == pytest.approx((2.0, 4.303 / math.sqrt(3)), rel=1e-4)
    assert estimate.verdict() == "no clear difference"
    assert tables.Estimate(-2.0, 1.9).verdict() == "loses"
    assert tables.Estimate(2.0, 1.9).verdict() == "gains"
    assert tables.Estimate.of([0.0, 0.0]).verdict() == "the same"
    assert tables.Estimate.of([0.5]).verdict() == "no clear difference"
    assert tables.Estimate.of([0.5]).text("+.1f") == "+0.5"


def test_tables_of_both_accountings():
    blocks = tables.as_text(RESULTS).split("\n\n")
    cells = [
        {line[:30].strip(): re.split(r"\s\s+", line[30:].strip()) for line in block.splitlines()}
        for block in blocks
    ]
    rows, less, epochs, less_epochs, less_doubled = cells[:5]
    assert rows["standard"] == ["40.0%", "20.0", "10.0", "20.0%", "0.5000", "32", "3"]
    assert rows["MIRROR"] == ["25.0%", "-", "-", "12.5%", "3.0000", "32", "1"]
    # Every run against that of its own seed: the half-width is 4.303 x 2 / sqrt(3).
    expected = ["+12.0 +- 5.0", "+6.0 +- 2.5", "-0.1000 +- 0.0000", "0.60 +- 0.25", "gains"]
    assert less["clipped"] == expected
    assert less["SyRM"][0].startswith("-30.0 +- 127") and less["SyRM"][-1] == "no clear difference"
    assert less["EMA"][-1] == "the same" and "standard" not in less
    assert DOUBLED not in rows and epochs["MIRROR, equal epochs"][-2:] == ["64", "1"]
    assert less_epochs["MIRROR, equal epochs"][0] == "+45.0"
    assert "minus standard, rows x 2" in less_doubled
    assert less_epochs["MIRROR, equal epochs"][3] == "0.60 +- 0.00"
    assert less_doubled["MIRROR, equal epochs"][0] == "+25.0"
    assert less_doubled["MIRROR, equal epochs"][3] == "1.20 +- 0.00"
    # A study that has only begun.
    assert "minus" not in tables.as_text(RESULTS | {"runs": [run("clipped", 3, 0.5)]})


def test_files_get_the_results_in_their_places():
    text = "a\n<!-- reproduce: caption -->\nold\n<!-- end -->\nb <!-- end -->\n"
    new = tables.inserted(RESULTS, text, "file")
    assert re.fullmatch(
        r"a\n<.*>\n`--scale ci`.* 14 fine-tunings of 7.0 hours .*\n<!-- end -->\nb <!-- end -->\n",
        new,
    )
    assert tables.inserted(RESULTS, new, "file") == new
    table = tables.inserted(RESULTS, text.replace("caption", "summary"), "file")
    assert (
        "| clipped | 52.0%, 24.0 | 26.0% | 0.4000 | +12.0 +- 5.0: gains | 0.60 +- 0.25 |" in table
    )
    with pytest.raises(UserError, match="--insert file: has no <!-- reproduce: NAME"):
        tables.inserted(RESULTS, "text", "file")


@pytest.mark.skipif(not COMMITTED.exists(), reason="the scale `laptop` has not been run")
@pytest.mark.parametrize("path", [ROOT / "README.md", EXAMPLE / "README.md"])
def test_the_readme_has_the_committed_results(path):
    text = path.read_text()
    results = reproduce.read_results(str(COMMITTED))
    assert tables.inserted(results, text, str(path)) == text


def test_only_methods_of_several_views_run_twice():
    for name in ("laptop", "gpu"):
        scale = SCALES[name]
        tasks = methods.tasks(scale)
        assert len(tasks) == len(set(tasks)) == len(scale.seeds) * (14 + 2)
        assert {task.method for task in tasks if task.epochs} == {"MIRROR", "P-POTS + MIRROR"}
        assert {task.seed for task in tasks[:16]} == {42}
        assert tasks[0] == Task(LONGER, 42)
        rows = {task.entry: task.batch(scale) * task.steps(scale) for task in tasks}
        assert rows["MIRROR, equal epochs"] == rows[DOUBLED] == 2 * rows["MIRROR"]
        assert rows[LONGER] == 4 * rows["EMA"]


def test_a_run_is_kept_and_a_failed_one_leaves_nothing(tmp_path):
    calls = []

    def work(path):
        calls.append(path)
        if len(calls) == 1:
            raise UserError("failed")
        return {"value": len(calls)}

    flags = as_flags({"views": 2, "clip": [0.3, 0.8]})
    assert flags == ["--mdm-views", "2", "--mdm-clip", "0.3", "0.8"]
    with pytest.raises(UserError):
        run_cached(tmp_path, flags, work)
    assert not list(tmp_path.iterdir())
    assert run_cached(tmp_path, flags, work) == run_cached(tmp_path, flags, work)
    assert len(calls) == 2
    assert run_cached(tmp_path, flags[:2], work)["value"] == 3


def test_a_failure_ends_the_others_and_what_waits(tmp_path):
    assert run_parallel(2, str, range(5)) == list("01234")
    # Processes that end and begin at the same time: none is taken for a failed one.
    (tmp_path / "pass.py").write_text("pass")
    name = str(tmp_path / "pass.py")
    run_parallel(8, lambda i: run_python([name], tmp_path / f"pass{i}.log", "nothing"), range(100))
    (tmp_path / "sleep.py").write_text("import time; time.sleep(600)")
    begun = []

    def work(number):
        begun.append(number)
        if number == 1:
            while not (tmp_path / "0.log").exists():
                time.sleep(0.01)
            raise UserError("failed")
        run_python([str(tmp_path / "sleep.py")], tmp_path / f"{number}.log", "sleeping")

    with pytest.raises(UserError, match="^failed$"):
        run_parallel(2, work, range(4))
    assert 3 not in begun


def study(*flags):
    command = [sys.executable, "examples/reproduce/reproduce.py", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a study at --scale ci, its flags, and how it ended."""
    directory = tmp_path_factory.mktemp("study")
    flags = ["--scale", "ci", "--directory", str(directory), "--json", f"{directory}/all.json"]
    ended = study(*flags, "--figure", f"{directory}/table.png")
    assert ended.returncode == 0, ended.stderr[-2000:]
    return directory, flags, ended


@pytest.mark.timeout(tiers.LONG)
def test_the_whole_study_makes_its_table(finished):
    directory, _, ended = finished
    results = reproduce.read_results(f"{directory}/all.json")
    assert [(r["method"], r["epochs"], r["rows"]) for r in results["runs"]] == [
        ("MIRROR", True, 640),
        ("standard", False, 320),
        ("MIRROR", False, 320),
        ("autoregressive", False, 320),
    ]
    for result in results["runs"]:
        assert 0 < result["nelbo"] < 6.2 and len(result["examples"]) == 3
        assert 0 <= result["solutions"] <= result["answers"] <= 1
        assert "--exit-on-missing-checkpoint" in result["flags"]
    noise = results["runs"][1]["noise"]
    assert noise["standard"] == 1.0
    assert noise.keys() == {"standard", "MIRROR", "MIRROR, equal epochs"}
    assert (directory / "table.png").stat().st_size > 5000
    assert study("--report", f"{directory}/all.json").stdout == ended.stdout


@pytest.mark.timeout(tiers.LONG)
def test_what_is_there_is_kept_and_a_base_that_is_gone_is_trained_anew(finished):
    directory, flags, ended = finished
    bases = sorted((directory / "ci").glob("*.checkpoint"))
    assert len(bases) == 2  # those of fine-tuned runs are gone
    shutil.rmtree(bases[0])
    before = {path: path.stat().st_mtime_ns for path in (directory / "ci").glob("*.json")}
    assert len(before) == 6
    again = study(*flags)
    assert again.stdout == ended.stdout
    after = {path: path.stat().st_mtime_ns for path in (directory / "ci").glob("*.json")}
    changed = {path for path in after if after[path] != before[path]}
    assert changed == {bases[0].with_suffix(".json")} and bases[0].exists()


@pytest.mark.timeout(tiers.LONG)
def test_another_scale_has_other_data_and_so_other_runs(finished):
    directory = finished[0] / "ci"
    other = Study(dataclasses.replace(SCALES["ci"], tests=5, texts=3000), directory, "cpu")
    same = Study(SCALES["ci"], directory, "cpu")
    task = Task("standard", 42)
    assert same.data in set(directory.iterdir())
    assert same.fine_tuning(task, Path("base")) != other.fine_tuning(task, Path("base"))
    assert len((other.data / "test.jsonl").read_text().splitlines()) == 5


def noise_batches() -> None:
    """Batches on which the reproduction measures gradients, numbered as the run's own."""
    from noise import training_batches

    load, settings, size = sys.argv[sys.argv.index("--") + 1 :]
    with open_checkpoint(load, "cpu") as loaded:
        loaded.args.seed -= 1
        methods = [json.loads(settings), {"rate_sampler": "ppots", "ppots_bins": 8}]
        methods[1]["ppots_refit_interval"] = 50
        methods.append(METHODS["bell-fade"])
        drawn = [
            [batch.corruption for batch in training_batches(loaded, method, int(size), 4)]
            for method in methods
        ]
    same = [(list(c.t), c.tokens.tolist()) for c in drawn[0]]
    weights = torch.cat([c.rate_weight for c in drawn[1]])
    bell = torch.cat([torch.stack([c.t, c.rate_weight]) for c in drawn[2]], dim=1)
    torch.save((same, weights, bell), f"{os.environ['TRACE_DIR']}/noise.pt")


def test_gradients_are_measured_on_batches_that_training_draws(tmp_path):
    """A run with everything, and what is measured at its checkpoint under the same numbers."""
    ranks.write_pairs(tmp_path / "pairs", ranks.random_pairs(120))
    settings = {"quantiles": "strata", "mask": "bernoulli", "views": 2}
    settings |= {"isad_token_ids": [60, 61, 62], "isad_delta": 0.4}
    settings |= {"syrm_token_ids": [5, 6, 7], "syrm_fraction": 0.25}
    run = ranks.launch(
        tmp_path / "run",
        1,
        *"--mdm-sft --mdm-pad-eligible --mdm-normalization rows --train-iters 4".split(),
        *["--data-path", str(tmp_path / "pairs"), "--data-cache-path", str(tmp_path / "cache")],
        *["--save", str(tmp_path / "checkpoint"), "--save-interval", "4"],
        *as_flags(settings),
    )
    words = [str(tmp_path / "checkpoint"), json.dumps(settings), "8"]
    ranks.launch(tmp_path / "noise", 1, "--", *words, entry=noise_batches)
    batches, weights, (t, weights_of_bell) = torch.load(tmp_path / "noise/noise.pt")
    trained = [drawn for (split, _), drawn in sorted(run.masks().items()) if split == 0]
    assert [row for batch in batches for row in zip(*batch, strict=True)] == trained
    # The density that was fitted to the checkpoint: not uniform, and its weight within 1/0.1.
    assert len(weights.unique()) > 20 and 0 < weights.min() < 1 < weights.max() <= 10
    # A bell before it fades: rates of the middle, which weigh alike.
    assert (weights_of_bell == 1).all() and 0.2 < t.quantile(0.1) < 0.4 < t.median() < 0.6


CHECKS = """
from megatron_mdm.environment import prepare_environment
prepare_environment("cpu")
from megatron_mdm.mcore.device import training_device
with training_device("cpu"):
    from megatron_mdm.mcore.flags.arguments import parse
    parse()
    print("accepted")
"""


@pytest.mark.timeout(tiers.LONG)
def test_the_program_accepts_the_flags_of_every_run(finished, tmp_path):
    """Of the scale `laptop`, on the data and bases of the finished study."""
    names = ("texts", "pairs", "tests", "layers", "hidden", "heads")
    small = {name: getattr(SCALES["ci"], name) for name in names}
    done = Study(SCALES["ci"], finished[0] / "ci", "cpu")
    some = dataclasses.replace(done, scale=dataclasses.replace(SCALES["laptop"], **small))
    tasks = {task.entry: task for task in methods.tasks(some.scale)}
    assert {task.method for task in tasks.values()} == set(ALL) and some.data == done.data
    words = sentencepiece.SentencePieceProcessor(model_file=f"{done.data}/words.model")
    for word in methods.DELIMITERS + methods.STRUCTURE:
        assert words.piece_to_id(f"\u2581{word}") != words.unk_id(), word
    (tmp_path / "checks.py").write_text(CHECKS)

    def accepts(task, *more):
        base = done.pretrain(42, ALL[task.method].causal)
        command = [str(tmp_path / "checks.py"), *some.fine_tuning(task, base), *more]
        return run_python(command, tmp_path / f"{task.entry.replace('/', 'over')}.log", task.entry)

    for said in run_parallel(2, accepts, list(tasks.values())):
        assert said.splitlines()[-1] == "accepted"
    with pytest.raises(UserError):
        accepts(Task("MIRROR", 42), "--mdm-views", "3")
    assert "--mdm-views 3" in (tmp_path / "MIRROR.log").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --scale to train, or --report FILE"),
        (["--report", "nowhere.json"], "--report nowhere.json: cannot be read"),
        (["--report", "LIST"], "is not what --json writes (an object is missing)"),
        (["--report", "RUN"], "is not what --json writes (no answers)"),
        (["--scale", "ci", "--figure", "x.pdf"], "must end in .png or .svg"),
        (["--scale", "ci", "--figure", "FILE/x.png"], "cannot write "),
        (["--scale", "ci", "--directory", "FILE/x"], "cannot write "),
        (["--scale", "ci", "--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--report", "RESULTS", "--insert", "nowhere.md"], "--insert nowhere.md: cannot be read"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, message):
    (tmp_path / "FILE").write_text("")
    (tmp_path / "LIST").write_text("[1]")
    (tmp_path / "RESULTS").write_text(json.dumps(RESULTS))
    damaged = [{k: v for k, v in r.items() if k != "answers"} for r in RESULTS["runs"]]
    (tmp_path / "RUN").write_text(json.dumps(RESULTS | {"runs": damaged}))
    flags = [str(tmp_path / word) if word[:4].isupper() else word for word in flags]
    ended = ranks.run_forked("examples/reproduce/reproduce.py", *flags)
    assert ended.returncode == 2
    assert message in ended.stderr and len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read (No such file or directory)"), ("[1]\n", "give JSONL with prompt")],
)
def test_problems_that_cannot_be_read_are_one_line(tmp_path, content, message):
    path = tmp_path / "problems.jsonl"
    if content:
        path.write_text(content)
    words = ["--load", "x", "--json", "y", "--problems", str(path)]
    ended = ranks.run_forked("examples/reproduce/score.py", *words)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert f"--problems {path}: {message}" in ended.stderr
