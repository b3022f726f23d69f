"""Stages that explain the race: their runs at --scale ci, and tables of made-up results."""

import math
import re

import numpy as np
import pytest

from benchmarks.race import unigram
from benchmarks.race.plan import EVALUATIONS
from benchmarks.race.results import Record, Results
from benchmarks.race.scales import SCALES
from benchmarks.race.stages import ending, explain, local, tune
from benchmarks.race.training import Trainer

CI = SCALES["ci"]
BINS = [f"{(i + 0.5) / 10:.2f}" for i in range(10)]


def record(run, final=2.0, bins=(), judged=None):
    values = (final + 0.5,) * (EVALUATIONS - 1) + (final,)
    of_bins = dict(zip(BINS, bins or [final] * 10, strict=True))
    return Record(run, values, of_bins, 1.0, "program", "machine", "name", judged or {})


def with_rates(scale):
    """Results that determine all learning rates."""
    results = Results(scale)
    while missing := [run for run in tune.runs(results) if run not in results]:
        for run in missing:
            results.add(record(run))
    return results


@pytest.fixture
def tuned():
    """Results at --scale ci that determine the learning rates."""
    return with_rates(CI)


def cells(table):
    return {row[0]: list(row[1:]) for row in table.rows}


def test_no_run_is_known_before_the_rates():
    for stage in (ending, explain, local):
        assert stage.runs(Results(CI)) == [] == stage.summary(Results(CI))


def test_runs_of_the_ending_decay_late_and_fade_as_their_names_say(tuned):
    runs = ending.runs(tuned)
    assert (
        len(runs) == len(set(runs)) == 4 * len(CI.ending_seeds)
    )  # both lines of `uniform` have one learning rate
    assert all(run.judged for run in runs)
    assert len({run.lr for run in runs}) == 1
    assert all("--lr-decay-style WSD" in " ".join(run.flags) for run in runs)
    fades = {
        name: re.findall(r"--mdm-bell-fade (\S+ \S+)", " ".join(run.flags))
        for name, run in zip(list(ending.ENDINGS)[1:], runs, strict=True)
    }
    assert fades == {
        "uniform, at its own": [],
        "bell throughout": [],
        "fade from 40% to 70%": ["0.4 0.7"],
        "hard switch at 50%": ["0.5 0.5"],
    }


def test_uniform_has_the_learning_rate_of_the_bell_and_its_own():
    results = Results(SCALES["laptop"])
    while missing := [run for run in tune.runs(results) if run not in results]:
        for run in missing:
            best = 3e-3 if run.contender == "uniform" else 1.5e-3
            results.add(record(run, 2.0 + abs(run.lr - best)))
    runs = [x for x in ending.runs(results) if x.seed == 1]
    assert len(ending.runs(results)) == 5 * 4
    assert [x.lr for x in runs if x.contender == "uniform"] == [1.5e-3, 3e-3]
    assert {x.lr for x in runs if x.contender != "uniform"} == {1.5e-3}


def test_tables_of_the_ending():
    """The fade ends 0.1 below the bell; the noise of a seed is the same in all runs."""
    results = with_rates(SCALES["laptop"])
    for run in ending.runs(results):
        value = 2.0 + 0.01 * run.seed - 0.1 * ("0.7" in run.flags)
        text = {"nll": value, "stderr": 0.01, "distinct": 0.5}
        judged = {x: {"value": value, "stderr": 0.02} for x in ("nelbo", "below 0.1", "above 0.9")}
        judged |= {"random": text, "low-confidence": text, "held out": text | {"nll": 1.5}}
        results.add(record(run, value, judged=judged))
    losses, texts = ending.summary(results)
    assert cells(losses)["bell throughout"] == ["4", "2.0250", "", "2.0250", "", "2.0250", ""]
    fade = "-0.1000 [-0.1000, -0.1000]"
    expected = ["4", "1.9250", fade, "1.9250", fade, "1.9250", fade]
    assert cells(losses)["fade from 40% to 70%"] == expected
    assert "0.0200, 0.0200, 0.0200" in losses.notes[0]
    expected = ["4", "1.9250", fade, "0.5000", "1.9250", fade, "0.5000"]
    assert cells(texts)["fade from 40% to 70%"] == expected
    assert cells(texts)["held-out text"] == ["", *["1.5000", "", "0.5000"] * 2]


def test_tables_of_the_explanations(tuned):
    for run in explain.runs(tuned):
        case = explain.case_of(run)
        final = 2.0 + 0.1 * (case.objective == "bound")
        tuned.add(record(run, final, bins=[1.0] * 5 + [3.0] * 5))
    losses, effects, own, _ = explain.summary(tuned)
    assert {row[0]: set(row[1:]) for row in losses.rows} == {
        "bound, uniform": {"2.1000"},
        "bound, bell": {"2.1000"},
        "bell, uniform": {"2.0000"},
        "bell, bell": {"2.0000"},
    }
    assert cells(effects)["objective: bell minus bound"] == ["-0.1000"] * 2
    assert cells(effects)["sampling: bell minus uniform"] == ["+0.0000"] * 2
    assert {cell for row in cells(own).values() for cell in row} == {"2.0000"}
    assert effects.notes[0] == "by the rule: none is told from chance"  # from a single seed
    assert "batches of 8 rows have seen 4 times the rows" in effects.notes[1]


def test_a_run_that_diverged_is_told(tuned):
    run = explain.runs(tuned)[0]
    tuned.add(Record(run, (2.0,), {}, 1.0, "program", "machine", "name"))
    assert "diverged" in explain.summary(tuned)[0].rows[0]
    run = local.runs(tuned)[0]
    tuned.add(Record(run, (), {}, 1.0, "program", "machine", "name"))
    assert cells(local.summary(tuned)[0])[run.contender][0] == "diverged"
    run = ending.runs(tuned)[0]
    tuned.add(Record(run, (2.0,), {}, 1.0, "program", "machine", "name"))
    assert ending.summary(tuned) == []


def test_gaps_are_to_the_best_loss():
    run = CI.local.run("local", "bell", 1e-3, 1, data="unigram")
    best = np.linspace(3.0, 2.0, 16)  # for 0 to 15 visible tokens
    of_bins = unigram.per_bin(best, 10)
    found = local.gaps_of(record(run, 2.6, bins=list(of_bins + 0.2)), best)
    np.testing.assert_allclose(found, [0.1, 0.1 + 0.5 * 5 / 6, 0.2, 0.2])


@pytest.mark.parametrize(
    "uniform, bell, expected",
    [
        (0.2, [0.1, 0.1, 0.1], "the bell's gain remains where nothing is local"),
        (0.2, [0.201, 0.199, 0.2], "the bell's gain vanishes where nothing is local"),
        (0.2, [0.25, 0.251, 0.252], "the bell loses where nothing is local"),
        (0.2, [0.23, 0.17, 0.2], "undecided"),  # the interval is wider than a tenth
        (0.2, [0.17, 0.19, 0.16], "undecided"),
        (0.2, [0.1, 0.1, -0.01], "undecided"),
        (0.2, [0.1, 0.1, math.inf], "undecided"),
        (0.2, [0.1], "undecided"),
        (0.01, [0.001, 0.001, 0.001], "undecided"),  # there is hardly a gap to close
    ],
)
def test_the_rule_of_locality(uniform, bell, expected):
    by_name = {"uniform": dict(enumerate([uniform] * 3)), "bell": dict(enumerate(bell))}
    assert local.reading(dict.fromkeys(local.HEADINGS, by_name)).startswith(expected)


def test_a_share_of_a_gap_is_a_geometric_mean():
    found = local.share({1: 0.1, 2: 0.4, 3: 0.7}, {1: 0.2, 2: 0.2})
    assert found.value == pytest.approx(1.0) and found.low * found.high == pytest.approx(1.0)


def test_a_table_of_gaps_where_each_contender_has_diverged_once(tuned):
    for run in local.runs(tuned):
        has_diverged = (run.contender, run.seed) in (("bell", 1), ("uniform", 2))
        tuned.add(record(run, math.inf) if has_diverged else record(run, 4.0))
    (table,) = local.summary(tuned)
    assert cells(table)["bell"][:2] == ["diverged", "-"]
    assert "by the rule: undecided" in table.notes


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(CI, tmp_path_factory.mktemp("a race"), "cpu")


@pytest.mark.ranks
def test_a_model_is_judged_and_deleted(trainer, tuned):
    run = ending.runs(tuned)[-1]
    found = trainer(run)
    judged = found.judged
    assert set(judged) == {
        *("nelbo", "below 0.1", "above 0.9"),
        *("random", "low-confidence", "held out"),
    }
    # Both numbers are of the same rows.
    error = 5 * judged["nelbo"]["stderr"]
    assert judged["nelbo"]["value"] == pytest.approx(found.final, abs=error)
    # A model that has learnt little is about as good as a uniform guess over all bytes.
    for name in ("random", "low-confidence", "held out"):
        assert 2.0 < judged[name]["nll"] < 1.2 * math.log(256)
        assert 0.0 < judged[name]["distinct"] <= 1.0
    checkpoints = [path for path in trainer.directory.iterdir() if (path / "iter_0000017").exists()]
    assert len(checkpoints) == 1  # the judge's checkpoint
    assert trainer(run) == found


@pytest.mark.ranks
@pytest.mark.parametrize("cell", [("bound", "bell"), ("bell", "uniform"), ("bell", "bell")])
def test_runs_of_the_explanations_train(trainer, tuned, cell):
    runs = [x for x in explain.runs(tuned) if explain.case_of(x)[:2] == cell]
    assert math.isfinite(trainer(runs[0]).final)


@pytest.mark.ranks
def test_runs_on_independent_tokens_are_measured_on_rows_of_known_loss(trainer, tuned):
    run = local.runs(tuned)[0]
    found = trainer(run)
    rows = unigram.held_out_rows(run.length, CI.held_out)
    written = np.fromfile(trainer.directory / f"unigram_held_out_{run.length}.bin", np.uint16)
    assert np.array_equal(written.reshape(rows.shape), rows)
    best = unigram.best_losses_of(rows, unigram.SYMBOLS, unigram.CONCENTRATION)
    assert best.mean() - 0.1 < found.final < math.log(257)
