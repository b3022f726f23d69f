"""Named validation sets: each has the numbers of a run that validates on this set alone."""

import json
import os

import numpy as np
import pytest
import torch

from megatron_mdm.errors import UserError
from megatron_mdm.mcore.data.validation_sets import part_of_set
from megatron_mdm.mcore.device import replaced
from megatron_mdm.mcore.flags.data_files import check_validation_sets
from megatron_mdm.mcore.training.metrics import Recorder
from megatron_mdm.objective.randomness import Split
from megatron_mdm.pretrain import main
from tests import ranks

NAMES = ("web", "code", "few.texts")
STEPS = "--train-iters 2 --eval-interval 1 --eval-iters 2".split()
LAYOUTS = {
    "1 rank": (1, ""),
    "DP 2": (2, ""),
    "TP 2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP 2 x VP 2": (
        2,
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
    ),
}


def numbers(run, name):
    """All TensorBoard scalars of evaluations of `validation` as a whole, or of one of its sets."""
    start = f"mdm/{name} "
    others = tuple(f"mdm/validation {x} " for x in NAMES) if name == "validation" else ()
    return {
        tag.removeprefix(start): values
        for tag, values in run.scalars.items()
        if tag.startswith(start) and not tag.startswith(others or "-")
    }


def rows_of(run, part):
    return {row: value for (its, row), value in run.masks().items() if its == part}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three sets of text. The last one has fewer texts than an evaluation takes rows."""
    directory = tmp_path_factory.mktemp("sets")
    few = [[5 + i % 90] * 31 + [ranks.EOD_ID] for i in range(3)]
    ranks.write_documents(directory / "web", ranks.random_documents(60, seed=1))
    ranks.write_documents(directory / "code", ranks.random_documents(90, seed=2))
    ranks.write_documents(directory / "few.texts", few)
    return {name: str(directory / name) for name in NAMES}


@pytest.fixture(scope="module")
def flags(base, data):
    """The flags of `base`, with separate training data."""
    return ["--train-data-path", str(data), *base[2:]]


@pytest.fixture(scope="module")
def runs(flags, files, tmp_path_factory):
    """All sets together under each layout, and each set alone."""
    named = ["--valid-data-path", *files.values(), "--validation-set-names", *NAMES]
    words = {
        name: (count, [*flags, *STEPS, *named, *layout.split()])
        for name, (count, layout) in LAYOUTS.items()
    }
    words |= {
        name: (1, [*flags, *STEPS, "--valid-data-path", file]) for name, file in files.items()
    }
    directory = tmp_path_factory.mktemp("runs")
    return ranks.launch_layouts(directory, words, drop=["--split"])


@pytest.mark.parametrize("number, name", enumerate(NAMES))
def test_a_set_has_the_numbers_of_a_run_of_its_own(runs, number, name):
    """Equal bit for bit, because rows, rates, masks and their batches are equal."""
    alone, together = (
        numbers(runs[name], "validation"),
        numbers(runs["1 rank"], f"validation {name}"),
    )
    assert len(alone["NELBO"]) == 3  # after each step and at the end
    assert together == alone
    rows = rows_of(runs["1 rank"], part_of_set(number))
    assert len(rows) == 16 and rows == rows_of(runs[name], Split.VALID)
    assert runs["1 rank"].losses == runs[name].losses
    line = next(x for x in runs[name].output[0].splitlines() if "validation NELBO" in x)
    assert line.replace("validation", f"validation {name}") in runs["1 rank"].output[0]
    of = "16 rows, 3 of them different" if name == "few.texts" else "16 rows"
    assert f"(mean over {of})" in line


def test_the_validation_is_the_mean_over_its_sets(runs):
    run = runs["1 rank"]
    sets = [numbers(run, f"validation {name}") for name in NAMES]
    assert numbers(run, "validation")["NELBO"] == pytest.approx(
        np.mean([x["NELBO"] for x in sets], axis=0), rel=1e-6
    )
    errors = np.array([x["NELBO stderr"] for x in sets])
    assert (errors > 0).all()
    assert numbers(run, "validation")["NELBO stderr"] == pytest.approx(
        np.sqrt((errors**2).sum(axis=0)) / 3, rel=1e-6
    )
    # Megatron's own number is a mean over tokens, of which all rows have equally many.
    assert run.scalars["mdm loss validation"][0] == pytest.approx(
        numbers(run, "validation")["NELBO"][0], rel=1e-5
    )


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "1 rank"])
def test_layouts_are_equal(runs, layout):
    one, other = runs["1 rank"], runs[layout]
    assert other.masks() == one.masks()
    for name in ("validation", *(f"validation {name}" for name in NAMES)):
        expected, found = numbers(one, name), numbers(other, name)
        assert found.keys() == expected.keys() and len(expected["NELBO"]) == 3
        for tag, values in expected.items():
            assert found[tag] == pytest.approx(values, rel=1e-4), (name, tag)


def losses_of_rows():
    """Runs the program and saves (part, text, loss) of all evaluated rows."""
    found: list = []
    add = Recorder.add

    def recording_add(recorder, *, text=None, **columns):
        if text is not None:
            found.append(torch.stack([columns["split"], text, columns["loss"].double()]))
        add(recorder, text=text, **columns)

    with replaced(Recorder, "add", recording_add):
        main()
    torch.save(torch.cat(found, dim=1), f"{os.environ['TRACE_DIR']}/trace{os.environ['RANK']}.pt")


def test_errors_are_those_of_the_rows_losses(flags, files, tmp_path):
    """Under two data-parallel ranks, with two evaluations and no step between them."""
    named = [files["web"], files["code"], "--validation-set-names", "web", "code"]
    steps = "--train-iters 1 --eval-interval 9 --eval-iters 2 --skip-train".split()
    words = [*flags, *steps, "--valid-data-path", *named]
    run = ranks.launch(tmp_path, 2, *words, entry=losses_of_rows, drop=["--split"])
    parts, texts, losses = torch.cat(run.traces, dim=1).numpy()
    errors = []
    for number, name in enumerate(("web", "code")):
        own = losses[parts == part_of_set(number)]
        assert len(own) == len(set(texts[parts == part_of_set(number)])) == 16
        scalars = numbers(run, f"validation {name}")
        errors.append(np.std(own, ddof=1) / 4)
        assert scalars["NELBO"] == pytest.approx([own.mean()], rel=1e-6)
        assert scalars["NELBO stderr"] == pytest.approx([errors[-1]], rel=1e-6)
    overall = np.hypot(*errors) / 2
    assert run.scalars["mdm/validation NELBO stderr"] == pytest.approx([overall], rel=1e-6)
    assert run.scalars["mdm/validation NELBO"] == pytest.approx([losses.mean()], rel=1e-6)


def test_pairs_and_a_single_name(flags, pairs, tmp_path):
    """Pairs, and files named in JSON. The test split is one set, of as many rows as all sets."""
    ranks.write_pairs(tmp_path / "more", ranks.random_pairs(50, seed=5))
    flags = [*STEPS, "--mdm-sft", "--mdm-normalization", "rows", *flags[2:]]
    files = [str(tmp_path / "more"), str(pairs)]
    parts = {"train": [str(pairs)], "valid": files[:1], "test": [str(pairs)]}
    (tmp_path / "parts.json").write_text(json.dumps(parts))
    in_json = ["--per-split-data-args-path", str(tmp_path / "parts.json"), *flags]
    flags += ["--train-data-path", str(pairs), "--test-data-path", str(pairs)]
    words = {
        "both": [*flags, "--valid-data-path", *files, "--validation-set-names", "more", "pairs"],
        "named": [*in_json, "--validation-set-names", "more"],
        "more": [*flags, "--valid-data-path", files[0]],
        "pairs": [*flags, "--valid-data-path", files[1]],
    }
    runs = ranks.launch_all(tmp_path, 1, words, drop=["--split"])
    for name in ("more", "pairs"):
        alone = numbers(runs[name], "validation")
        assert len(alone["NELBO"]) == 3
        assert numbers(runs["both"], f"validation {name}") == alone
    alone = numbers(runs["more"], "validation")
    named = runs["named"].scalars
    assert {tag: named[f"mdm/validation more {tag}"] for tag in alone} == alone
    assert {tag: named[f"mdm/validation {tag}"] for tag in alone} == alone
    assert set(rows_of(runs["both"], Split.TEST)) == set(range(32))
    assert set(rows_of(runs["more"], Split.TEST)) == set(range(16))


def test_a_resume_and_tools_go_on_and_other_sets_are_refused(flags, files, tmp_path):
    named = [files["web"], files["code"], "--validation-set-names", "web", "code"]
    steps = "--train-iters 4 --eval-interval 1 --eval-iters 1 --save-interval 2".split()
    save = ["--save", str(tmp_path / "checkpoint")]
    begin = [*flags, *steps, *save]
    valid = ["--valid-data-path", *named]
    options = {"drop": ["--split"]}
    whole = ranks.launch(tmp_path / "whole", 1, *flags, *steps, *valid, **options)
    first = ranks.launch(tmp_path / "first", 1, *begin, *valid, "--exit-interval", "2", **options)
    resume = [x for x in begin if x != "--finetune"]
    resume[resume.index("--load") + 1] = save[1]
    second = ranks.launch(tmp_path / "second", 2, *resume, *valid, **options)
    for name in ("validation", "validation web", "validation code"):
        parts = [numbers(run, name)["NELBO"] for run in (first, second)]
        assert [*parts[0][:2], *parts[1]] == pytest.approx(
            numbers(whole, name)["NELBO"], rel=1e-4
        ), name
    others = {
        "renamed": [files["web"], files["code"], "--validation-set-names", "web", "programs"],
        "one": [files["web"], "--validation-set-names", "web"],
        "blend": [files["web"], files["code"]],
    }
    for name, words in others.items():
        again = ["--valid-data-path", *words, "--train-iters", "5"]
        run = ranks.launch(tmp_path / name, 1, *resume, *again, check=False, **options)
        assert run.status == [2]
        line = ranks.the_error_line(run.output)
        assert "was trained on other data: " in line
        if name == "renamed":
            assert "valid programs, weight None, in the checkpoint valid code, weight None" in line
    again = ["--valid-data-path", *others["renamed"], "--train-iters", "5"]
    allowed = [*resume, *again, "--mdm-allow-flag-change", "--override-opt_param-scheduler"]
    run = ranks.launch(tmp_path / "allowed", 1, *allowed, **options)
    assert "the run resumes on other data: " in run.output[0]
    assert len(numbers(run, "validation web")["NELBO"]) == 2
    fit = f"--load {save[1]} --device cpu --rows 4 --masks 8 --rates 2".split()
    for data in ([], ["--data-path", files["code"]]):  # the run's data, and data without names
        output = ["--output", str(tmp_path / f"{len(data)}.json")]
        tool = ranks.run_forked("tools/fit_ppots.py", *fit, *output, *data)
        assert tool.returncode == 0, tool.stderr[-2000:]


PARTS = [(["train"], None), (["a", "b"], None), None]


@pytest.mark.parametrize(
    "names, parts, message",
    [
        (["a", "b"], None, "needs a file for each set: give --valid-data-path, with --train-data"),
        (["a", "b"], [PARTS[0], None, None], "needs a file for each set: give --valid-data-path"),
        (["a"], PARTS, "gives 1 names, and --valid-data-path has 2 files: give one name for each"),
        (["a", "a"], PARTS, "gives a twice: each set needs its own"),
        (["a", "b/c"], PARTS, "'b/c': a name is part of TensorBoard's; use letters, digits, and"),
        (["a", ""], PARTS, "'': a name is part of TensorBoard's"),
        (
            ["a", "b"],
            [PARTS[0], (["a", "b"], [0.5, 0.5]), None],
            "makes a set of each file of --valid-data-path: leave out the weights, or the names",
        ),
    ],
)
def test_names_that_do_not_fit(names, parts, message):
    with pytest.raises(UserError) as caught:
        check_validation_sets(names, parts)
    assert str(caught.value).startswith("--validation-set-names ")
    assert message in str(caught.value)


def test_names_that_fit():
    check_validation_sets(["a", "b-2_x.y"], PARTS)
    check_validation_sets(None, None)


def test_mistakes_are_one_line(flags, files, tmp_path):
    """Names without files, a set without a whole row, and a set that does not exist."""
    ranks.write_documents(tmp_path / "short", [[5] * 30])
    short, missing = str(tmp_path / "short"), str(tmp_path / "missing")
    named = ["--validation-set-names", "web", "short", "--valid-data-path", files["web"]]
    words = {
        "mock": (["--mock-data", *named[:3]], ["--split"], "needs a file for each set"),
        "short": ([*flags, *named, short], ["--split"], f"of {short} has 30 tokens, fewer than"),
        "missing": ([*flags, *named, missing], ["--split"], f"{missing}.bin does not exist"),
        "multiple": ([*flags, *named, short, "--multiple-validation-sets"], ["--split"], "cannot"),
    }
    for name, (own, drop, message) in words.items():
        run = ranks.launch(tmp_path / name, 1, *own, *STEPS, drop=drop, check=False)
        assert run.status == [2], name
        assert message in ranks.the_error_line(run.output)
