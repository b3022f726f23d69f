"""tools/variance_report.py on a checkpoint."""

import itertools
import json
import os
import runpy
import subprocess
import sys
from argparse import Namespace

import pytest

from tests import ROOT, ranks
from tests.ranks import entries

TOOL = "tools/variance_report.py"


def report(base, data, output, *flags, without=()):
    words = ["--device", "cpu", "--data", str(data), "--load", base[base.index("--load") + 1]]
    words += ["--output", str(output), "--rows", "40", "--methods", "none", *flags]
    return ranks.run_forked(TOOL, *words, without=without)


def errors(run):
    """The only error line of a refused run."""
    assert run.returncode == 2
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in run.stderr
    return line


def test_a_checkpoint_gives_a_report(base, data, tmp_path):
    own = base[base.index("--load") + 1]
    head = ["--parameters", "output_layer", "--batch", "4"]
    runs = {
        "whole": ["--sketch", "1000000"],
        "sketch": [],
        "group": [*head, "--methods", "mirror", "ppots-gradient"],
        "own weights": [*head, "--autoregressive", own],
    }
    results = {}
    for name, flags in runs.items():
        run = report(base, data, tmp_path / f"{name}.json", *flags)
        assert run.returncode == 0, run.stderr[-2000:]
        assert "A     mask pattern" in run.stdout
        assert "C     autoregressive" in run.stdout
        # 20 steps of masked diffusion do not teach next tokens.
        assert "WARNING: this network does not predict next tokens" in run.stdout
        results[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] * 4 + [".png"] * 4
    for part, value in results["whole"]["loss"].items():
        assert value == pytest.approx(results["sketch"]["loss"][part], rel=1e-4), part
    whole, sketch, group = (results[name]["gradient"] for name in ("whole", "sketch", "group"))
    assert sketch["total"][0] == pytest.approx(whole["total"][0], rel=0.05)
    assert sketch["A"] == pytest.approx(whole["A"], rel=0.05)
    assert 0 < group["A"][0] < whole["A"][0]
    assert [row["method"] for row in results["group"]["methods"]] == ["mirror", "ppots-gradient"]
    others = [dict(results[name]["autoregressive"]) for name in ("group", "own weights")]
    assert [other.pop("checkpoint") for other in others] == [None, own]
    assert others[0] == others[1]


def test_prompts_and_responses_are_measured_on_the_responses(base, pairs, tmp_path):
    """Rows are those of fine-tuning, in which tokens of prompts never count."""
    run = report(base, pairs, tmp_path / "pairs.json", "--rows", "12")
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads((tmp_path / "pairs.json").read_text())
    assert result["loss"]["A"][0] > 0
    # Responses use 50 ids and the end of document, prompts use 47 other ids.
    assert 1.5 < result["autoregressive"]["unigram entropy"] < 4.0
    assert "responses" not in run.stderr.splitlines()[-1]


def test_ranks_give_the_same_report(base, data, tmp_path):
    """Tensor-parallel ranks divide the parameters, but both hold the layer norms."""
    flags = ["--rows", "8", "--methods", "none"]
    groups = {
        "all": ["--sketch", "1000000"],
        "norms": ["--parameters", "norm"],
        "sketch": ["--sketch", "4000"],
        "blocks": ["--sketch", "1000000", *"--block-size 4 --rate-per block".split()],
    }
    tool = ["--", TOOL, "--device", "cpu", "--data", str(data)]
    tool += ["--load", base[base.index("--load") + 1]]
    runs = {
        f"{name} {count}": (
            count,
            [*tool, "--output", str(tmp_path / f"{name} {count}.json"), *flags, *more],
        )
        for count, (name, more) in itertools.product((1, 2), groups.items())
    }
    ranks.launch_layouts(tmp_path, runs, entry=entries.tool)
    reports = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in runs}
    for name in groups:
        one, two = reports[f"{name} 1"], reports[f"{name} 2"]
        # Two ranks project with other random numbers than one; only the means are equal.
        near, parts = (0.2, ["total"]) if name == "sketch" else (1e-3, ["A", "B", "C"])
        scale = one["gradient"]["total"][0]
        for part in parts:
            a, b = (report["gradient"][part][0] / scale for report in (one, two))
            assert a == pytest.approx(b, abs=near), part
        a, b = (report["autoregressive"]["gradient"]["C"][0] for report in (one, two))
        assert a == pytest.approx(b, rel=near)
        assert one["loss"]["A"] == pytest.approx(two["loss"]["A"], rel=1e-4)
    whole, blocks = reports["all 1"], reports["blocks 1"]
    assert (blocks["settings"]["block_size"], blocks["settings"]["rate_per"]) == (4, "block")
    assert blocks["gradient"]["total"] != whole["gradient"]["total"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rates", "2"], "--rates 3"),
        (["--seed", "-1"], "--seed -1: must not be negative"),
        (["--methods", "nothing"], "--methods: there is no 'nothing'"),
        (["--figure", "x.pdf"], "must end in .png or .svg"),
        (["--parameters", "nowhere"], "--parameters nowhere: no parameter has that"),
        (["--autoregressive", "nowhere"], "no checkpoint in nowhere"),
    ],
)
def test_bad_input_is_one_line(base, data, tmp_path, flags, message):
    assert message in errors(report(base, data, tmp_path / "x.json", *flags))
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_nothing_is_measured(base, data, tmp_path):
    run = report(base, data, tmp_path / "x.json", without=["matplotlib"])
    assert "needs matplotlib: pip install 'megatron-mdm[plot]'" in errors(run)


@pytest.mark.parametrize(("tool", "name"), [(TOOL, "text"), ("tools/evaluate.py", "plain_text")])
def test_tokens_of_another_tokenizer_are_one_line(base, tmp_path, tool, name):
    """The test starts the tools as users do."""
    ranks.write_documents(tmp_path / "text", [[5, 30_000, 7]] * 20)
    (tmp_path / "plain_text").write_text("5 30000 7")
    command = [sys.executable, tool, "--device", "cpu", "--data", str(tmp_path / name)]
    command += ["--load", base[base.index("--load") + 1]]
    command += ["--output", str(tmp_path / "x.json")] if tool == TOOL else []
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "text contains the token id 30000 and the model has only 128 token ids" in errors(run)


def test_another_measurement_is_told_by_flags_and_files(tmp_path):
    """A measurement goes on only under equal settings, with equal sizes and times of files."""
    tool = runpy.run_path(str(ROOT / TOOL))
    checkpoint, data = tmp_path / "checkpoint", tmp_path / "text"
    checkpoint.mkdir()
    step = checkpoint / "latest_checkpointed_iteration.txt"
    step.write_text("20\n")
    ranks.write_documents(data, ranks.random_documents(10))

    def identity(**changes):
        options = {"load": str(checkpoint), "data": str(data), "json_key": "text"}
        options |= {"format": "auto", "autoregressive": None, "parameters": "", **changes}
        return json.dumps(tool["identity"](Namespace(**options), 8192, 1))

    seen = [identity(), identity(json_key="words"), identity(autoregressive=str(checkpoint))]
    seen += [identity(parameters="norm"), identity(format="text")]
    for change in (
        lambda: ranks.write_documents(data, ranks.random_documents(11)),
        lambda: os.utime(f"{data}.bin", (1, 1)),
        lambda: step.write_text("40\n"),
        lambda: os.utime(step, (1, 1)),
    ):
        change()
        seen.append(identity())
    assert len(set(seen)) == len(seen)
    assert identity() == seen[-1]
