"""Fine-tuning on prompts and responses: masked tokens, their order, and layouts."""

import json

import pytest

from tests import ranks

SYRM = "--mdm-syrm-token-ids 5 6 7 --mdm-syrm-fraction 0.25".split()
METHODS = "--mdm-sft --mdm-pad-eligible --mdm-normalization rows --mdm-views 2".split()


@pytest.fixture(scope="module")
def runs(base, pairs, tmp_path_factory):
    """Runs with all methods at once, under three layouts, and one run without SyRM."""
    directory = tmp_path_factory.mktemp("sft")
    flags = [*base, *METHODS, "--data-path", str(pairs), "--mdm-recipe", "ppots"]
    flags += ["--mdm-ppots-refit-interval", "3", "--mdm-ppots-bins", "4", "--eval-iters", "1"]
    flags += ["--train-iters", "8"]
    layouts = {
        "plain": (1, flags),
        "1 rank": (1, [*flags, *SYRM, "--micro-batch-size", "4"]),
        "DP 2": (2, [*flags, *SYRM]),
        "PP 2": (2, [*flags, *SYRM, "--pipeline-model-parallel-size", "2"]),
    }
    return ranks.launch_layouts(directory, layouts)


@pytest.mark.parametrize("layout", ["DP 2", "PP 2"])
def test_layouts_are_equal(runs, layout):
    assert runs[layout].masks().keys() == runs["1 rank"].masks().keys()
    assert runs[layout].losses == pytest.approx(runs["1 rank"].losses, rel=1e-4)
    assert runs[layout].grad_norms == pytest.approx(runs["1 rank"].grad_norms, rel=1e-4)


def texts(run, split):
    """The masked tokens of each row of a split, in the order of rows."""
    return [tokens for (s, _), (_, tokens) in sorted(run.masks().items()) if s == split]


def prompts_of(rows):
    """(masked, clean) tokens of each row's prompt, where exactly one prompt length fits the row."""
    by_response = {}
    for prompt, response in ranks.random_pairs(120):
        by_response[tuple(prompt + response)] = len(prompt)
    found = []
    for row in rows:
        matches = {
            n
            for clean, n in by_response.items()
            if all(
                x in (ranks.MASK_ID, clean[i] if i < len(clean) else ranks.EOD_ID)
                for i, x in enumerate(row)
            )
        }
        if len(matches) == 1:
            n = matches.pop()
            clean = next(
                c
                for c, m in by_response.items()
                if m == n and all(x in (ranks.MASK_ID, y) for x, y in zip(row, c, strict=False))
            )
            found.append((row[:n], clean[:n]))
    return found


def test_prompts_stay_visible(runs):
    found = prompts_of(texts(runs["plain"], 0))
    assert len(found) > 30  # fully masked rows cannot be identified
    assert all(list(row) == list(prompt) for row, prompt in found)


def test_syrm_masks_structural_tokens_and_a_fraction_of_the_others(runs):
    found = prompts_of(texts(runs["1 rank"], 0))
    masked, structural = [], []
    for row, prompt in found:
        for x, clean in zip(row, prompt, strict=True):
            (structural if clean in (5, 6, 7) else masked).append(x == ranks.MASK_ID)
    assert any(structural) and any(masked)
    assert sum(masked) / len(masked) < 0.25 < sum(structural) / len(structural)


def test_validation_never_masks_prompts(runs):
    found = prompts_of(texts(runs["1 rank"], 1))
    assert found
    assert all(list(row) == list(prompt) for row, prompt in found)


def test_an_epoch_has_every_pair_once(runs, pairs):
    """108 of 120 pairs are for training, and 8 steps take 4 of them each, in two views."""
    rows = texts(runs["plain"], 0)
    assert len(rows) == 64
    assert all(len(row) == 32 for row in rows)
    output = runs["plain"].output[0]
    assert "108 pairs, 0 left out" in output
    # The default number of rows is 8 steps of 8 rows.
    assert f"takes 64 rows, 2 views of each of 32, from {pairs}: 0.30 epochs of 108 rows" in output


def test_data_that_does_not_fit_is_named(base, data, pairs, tmp_path):
    flags = [*base, "--mdm-sft"]
    run = ranks.launch(tmp_path / "text", 1, *flags, check=False)
    assert run.status == [2]
    assert "does not consist of pairs" in run.output[0]
    short = ["--data-path", str(pairs), "--seq-length", "1", "--max-position-embeddings", "1"]
    flags = [*short, "--mdm-sft"]
    run = ranks.launch(tmp_path / "short", 1, *flags, check=False)
    assert run.status == [2]
    assert "no pair of at most --seq-length 1 tokens" in run.output[0]


PACKED = [
    *"--mdm-sft --mdm-isolate-documents --mdm-rate-per document".split(),
    *"--mdm-normalization rows --mdm-views 2 --mdm-mask exact-count".split(),
]


@pytest.fixture(scope="module")
def packed(base, pairs, tmp_path_factory):
    """A run of ten steps of packed rows, and the same in two runs under different layouts."""
    directory = tmp_path_factory.mktemp("packed")
    flags = [*base, *PACKED, "--data-path", str(pairs), "--eval-iters", "1"]
    whole = ranks.launch(directory / "whole", 1, *flags, "--train-iters", "10")
    save = ["--save", str(directory / "checkpoint"), "--save-interval", "4"]
    first = ranks.launch(
        directory / "first", 1, *flags, *save, "--train-iters", "10", "--exit-interval", "4"
    )
    resume = [x for x in flags if x != "--finetune"]
    resume[resume.index("--load") + 1] = str(directory / "checkpoint")
    stages = "--pipeline-model-parallel-size 2 --micro-batch-size 4".split()
    second = ranks.launch(directory / "second", 2, *resume, "--train-iters", "10", *stages)
    return whole, first, second


def test_packed_rows_resume_under_another_layout(packed):
    whole, first, second = packed
    parts = {**first.masks(), **second.masks()}
    ranks.assert_masks_equal_after_refits(parts, whole.masks())
    assert first.losses + second.losses == pytest.approx(whole.losses, rel=1e-5)


def pairs_in(rows):
    """Indices of the pairs whose prompt and response (unless masked) are in these rows."""
    pairs = [(p, [*p, *r]) for p, r in ranks.random_pairs(120)]
    found = []
    for row in rows:
        start = 0
        while start < len(row):
            matches = [
                n
                for n, (prompt, clean) in enumerate(pairs)
                if list(row[start : start + len(prompt)]) == prompt
                and len(row[start:]) >= len(clean)
                and all(
                    x in (ranks.MASK_ID, y)
                    for x, y in zip(row[start : start + len(clean)], clean, strict=True)
                )
            ]
            if len(matches) != 1:
                break  # the row's end, or masks that fit several pairs
            found += matches
            start += len(pairs[matches[0]][1])
    return found


def test_packed_rows_hold_every_pair_once_an_epoch(packed):
    rows = texts(packed[0], 0)
    line = next(x for x in packed[0].output[0].splitlines() if "108 pairs" in x)
    in_epoch = int(line.split(" in ")[1].split(" rows")[0])
    tokens = sum(len(p) + len(r) for p, r in ranks.random_pairs(120))
    assert in_epoch < 1.2 * tokens / 32
    epoch = rows[0 : 2 * min(in_epoch, 40) : 2]  # one of the two views
    found = pairs_in(epoch)
    assert len(found) > len(epoch)
    assert len(found) == len(set(found))
    assert any("12 pairs" in x and "in 12 rows" in x for x in packed[0].output[0].splitlines())


def test_a_density_for_fine_tuning_is_measured_on_its_pairs(base, pairs, tmp_path):
    """Flags of the tool have the same effect as the same flags of the run saved in a checkpoint."""
    objective = "--mdm-sft --mdm-pad-eligible --mdm-normalization rows".split()
    objective += ["--mdm-mask", "exact-count"]
    data = ["--data-path", str(pairs)]
    still = ["--lr", "1e-30", "--train-iters", "1"]
    still += ["--save", str(tmp_path / "tuned"), "--save-interval", "1"]
    ranks.launch(tmp_path / "run", 1, *base, *data, *objective, *still)

    def moments(load, *flags):
        output = tmp_path / "fit.json"
        sizes = "--rates 4 --rows 8 --masks 2 --family piecewise".split()
        ranks.fit_ppots(load, output, *sizes, *flags)
        return json.loads(output.read_text())["moments"]

    expected = moments(tmp_path / "tuned")
    checkpoint = base[base.index("--load") + 1]
    assert moments(checkpoint, *data, *objective) == expected
    assert moments(checkpoint, *data, "--mdm-sft") != expected
