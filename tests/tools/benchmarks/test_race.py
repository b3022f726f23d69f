"""The race: the runs and their order, and the conclusions and reports from their results.

Most tests train nothing: a function gives the NELBO that a run would have.
"""

import argparse
import dataclasses
import json
import math
import random
import subprocess
import sys
import threading

import pytest

from benchmarks import race
from benchmarks.python_text import write_documents
from benchmarks.race import data, decide, figure, training
from benchmarks.race.compare import adjusted
from benchmarks.race.contenders import CONTENDERS, INCUMBENT, MAIN, OTHERS, write_density
from benchmarks.race.driver import all_runs, drive, seconds_of
from benchmarks.race.plan import Run
from benchmarks.race.results import Record, Results
from benchmarks.race.scales import SCALES
from benchmarks.race.stages import STAGES, confirm, incumbent, others, steps, transfer, tune
from megatron_mdm.errors import UserError
from megatron_mdm.experiments.program import program
from megatron_mdm.experiments.statistics import mean_interval
from megatron_mdm.file_locks import locked
from megatron_mdm.mcore.flags import arguments
from megatron_mdm.pictures import blank_figure
from tests import ROOT, shown

# The stages that explain the race are left out; they have tests of their own.
RACE = {
    name: STAGES[name]
    for name in ("tune", "confirm", "transfer", "steps", "incumbent", "others", "larger")
}
LAPTOP, CI = SCALES["laptop"], SCALES["ci"]
RATES = {"standard": 3e-3, "power": 24e-3, "bell": 0.75e-3}  # best rates; 3e-3 for the others


def record(run, final, seconds=10.0):
    curve = [final + 0.1 * i for i in reversed(range(len(run.evaluated)))]
    return Record(run, tuple(curve), {}, seconds, "program", "machine", "name")


def nelbo(run):
    """A NELBO that depends on the contender, its learning rate, the seed and the steps."""
    place = 1.5 if run.contender in INCUMBENT else list(CONTENDERS).index(run.contender)
    off = abs(math.log2(run.lr / RATES.get(run.contender, 3e-3)))
    less = 0.6 * (1500 / run.steps - 1) if run.stage == "steps" else 0.0
    return 3.0 - 0.1 * place + 0.05 * off + 0.01 * run.seed + 0.001 * place * (run.seed % 3) + less


def raced(scale, final=nelbo, stages=RACE, known=()):
    results = Results(scale, known)
    drive(list(stages.values()), results, lambda run: record(run, final(run)))
    return results


@pytest.fixture(scope="module")
def results():
    return raced(LAPTOP)


def runs_of(results, name):
    return [record.run for record in results.records if record.run.stage == name]


def test_no_contender_has_the_settings_of_another(tmp_path):
    flags = [sorted(x.flags(tmp_path)) for x in CONTENDERS.values()]
    assert all(flags.count(words) == 1 for words in flags)
    assert all(CONTENDERS[name].rate_of in MAIN for name in OTHERS)


@pytest.mark.parametrize("name", CONTENDERS)
def test_flags_of_every_contender_are_accepted(name, tmp_path, monkeypatch):
    write_density(tmp_path)
    more = "--mdm-device cpu --seq-length 8 --micro-batch-size 2 --global-batch-size 2 --lr 1"
    more += " --num-layers 1 --hidden-size 8 --num-attention-heads 1 --max-position-embeddings 8"
    more += " --train-iters 9 --eval-interval 9 --eval-iters 0 --mock-data"
    more += " --tokenizer-type NullTokenizer --vocab-size 8 --mdm-mask-token-id 7"
    flags = [*more.split(), *CONTENDERS[name].flags(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["pretrain", *flags])
    arguments.validate_flags(arguments.parse_args(arguments.add_arguments))


def test_a_grid_grows_while_its_best_rate_is_at_an_edge(results):
    assert tune.rate(results, "standard") == 3e-3
    assert tune.rate(results, "power") == 24e-3  # 12e-3, 24e-3 and 48e-3 were added
    assert tune.rate(results, "bell") == 0.75e-3
    tuned = runs_of(results, "tune")
    assert sorted(run.lr for run in tuned if run.contender == "power") == pytest.approx(
        [1.5e-3, 3e-3, 6e-3, 12e-3, 24e-3, 48e-3]
    )
    assert len(tuned) == 7 * 3 + 3 + 2
    assert {run.seed for run in tuned} == {LAPTOP.tune_seed}
    # The growth of a grid is limited.
    better = raced(LAPTOP, lambda run: 1.0 - run.lr, {"tune": tune})
    assert tune.rate(better, "standard") == pytest.approx(48e-3)
    assert len(better.records) == 7 * 6


def test_a_rate_at_which_a_run_diverges_is_not_chosen():
    def train(run):
        found = record(run, nelbo(run))
        return dataclasses.replace(found, nelbo=found.nelbo[:2]) if run.lr > 2e-3 else found

    results = Results(CI)
    drive([tune], results, train)
    assert results.records[0].final == math.inf
    results = Results(LAPTOP)
    drive([tune], results, train)
    assert tune.rate(results, "standard") == 1.5e-3
    assert "diverged" in tune.summary(results)[0].as_text()


def test_rates_are_not_known_before_their_grid_is():
    results = Results(LAPTOP)
    for run in tune.runs(results)[:3]:
        assert tune.rate(results, "standard") is None
        results.add(record(run, nelbo(run)))
    assert tune.rate(results, "standard") == 3e-3
    assert {run.contender for run in confirm.runs(results)} == {"standard"}
    assert tune.rate(results, "paper") == 3e-3 and tune.rate(results, "flat") is None


def test_every_stage_has_its_runs(results):
    shapes = [(128, 16, 1500), (64, 32, 1500), (256, 16, 1500)]
    confirmed = runs_of(results, "confirm")
    assert len(confirmed) == 7 * 8 and {run.seed for run in confirmed} == set(range(1, 9))
    assert all(run.lr == tune.rate(results, run.contender) for run in confirmed)
    assert confirm.winner(results) == "bell-late"
    transferred = runs_of(results, "transfer")
    assert len(transferred) == 2 * 4 * 5
    assert {(x.length, x.rows, x.steps) for x in transferred} == set(shapes[1:])
    assert {run.contender for run in runs_of(results, "steps")} == {"bell-late"}
    assert {run.steps for run in runs_of(results, "steps")} == {525, 675, 900, 1200}
    assert len(runs_of(results, "steps")) == 4 * (8 + 4 + 4)
    tuned, seeded = runs_of(results, "incumbent")[:3], runs_of(results, "incumbent")[3:]
    assert [x.lr for x in tuned] == list(LAPTOP.rates) and {x.seed for x in tuned} == {100}
    assert {(x.length, x.rows, x.steps) for x in seeded} == set(shapes)
    assert len(seeded) == 8 + 4 + 4 and {run.contender for run in seeded} == {"ppots"}
    assert [run.contender for run in runs_of(results, "others")] == list(OTHERS)
    larger = runs_of(results, "larger")
    assert len(larger) == 3 * 3 * 2
    assert {run.lr for run in larger if run.model == "2.4M"} == {3e-3 / 3}
    assert list(dict.fromkeys(x.run.stage for x in results.records)) == list(RACE)


def test_the_plan_is_known_before_any_result():
    stages = list(RACE.values())
    planned = all_runs(stages, Results(LAPTOP))
    assert len(planned) == len(set(planned)) == 21 + 56 + 40 + 64 + 19 + 8 + 18
    half = Results(LAPTOP)
    for run in planned[:100]:
        half.add(record(run, nelbo(run)))
    assert set(planned[:21]) <= set(all_runs(stages, half))
    # The plan takes far less than a day of two cores.
    assert 8 < sum(seconds_of(run, Results(LAPTOP)) for run in planned) / 3600 < 20
    # Finished runs predict the time of others.
    assert seconds_of(planned[0], half) == pytest.approx(10.0, rel=0.2)


def test_no_run_passes_over_the_data_more_than_once(tmp_path):
    planned = all_runs(list(STAGES.values()), Results(LAPTOP))
    longest = max(run.length * run.rows * run.steps for run in planned)
    assert longest == 12000 * 16 * 128
    (tmp_path / "training.bin").write_bytes(bytes(2 * 1000))
    assert data.training_flags(tmp_path, 1000) == ["--train-data-path", f"{tmp_path}/training"]
    with pytest.raises(
        UserError, match="a run takes 1001 tokens, more than one epoch: .* has 1000"
    ):
        data.training_flags(tmp_path, 1001)


def test_a_run_has_six_evaluations():
    for run in all_runs(list(STAGES.values()), Results(LAPTOP)):
        assert len(run.evaluated) == 6 and run.evaluated[-1] == run.steps
    assert Run("", "", 1, 1, "", 1500, 1.0, 1).evaluated == [251, 502, 753, 1004, 1255, 1500]


def test_the_winner_ends_exact():
    """`bell` is best of all and `standard` is second, but neither can win."""
    best = {"bell": 1.0, "standard": 1.5, "power": 2.0}
    results = raced(LAPTOP, lambda run: best.get(run.contender, 2.5))
    assert confirm.winner(results) == "power"
    assert {run.contender for run in runs_of(results, "transfer")} == {
        *("standard", "uniform", "clipped", "bell", "power"),
    }


def test_a_share_of_the_steps_is_interpolated():
    reached = {0.35: 2.6, 0.45: 2.4, 0.6: 2.3, 1.0: 2.0}
    assert steps.share_to(2.5, reached) == pytest.approx(0.4)
    assert steps.share_to(2.15, reached) == pytest.approx(0.8)
    assert steps.share_to(2.4, reached) == 0.45
    assert steps.share_to(2.7, reached) == 0.35  # no shorter run exists
    assert steps.share_to(1.9, reached) == math.inf
    assert steps.share_to(2.5, {0.35: math.inf, 0.45: 2.4}) == 0.45


def test_the_claims_are_said_to_be_reached_or_not(results):
    """`bell-late` ends 0.6 below `standard`, 0.3 below `clipped`, and 0.2 below `bell`."""
    (table,) = decide.summary(results)
    expected = ["reached", "not reached", "reached", "reached", "reached"]
    assert [row[3] for row in table.rows] == expected * 3
    assert table.notes[0] == "By the rules, `recommended` is bell-late."
    # It reaches the final loss of `standard` between 0.45 and 0.6 of its steps.
    shares = [row[2] for row in table.rows if "steps" in row[1]]
    assert [share[:3] for share in shares] == ["0.5"] * 3
    text = table.as_text()
    assert "128 x 16" in text and "64 x 32" in text and "256 x 16" in text


def test_nothing_is_claimed_before_the_last_run(results):
    known = Results(LAPTOP, [x for x in results.records if x.run.stage != "steps"])
    assert decide.summary(known) == []
    assert decide.summary(Results(LAPTOP)) == []


def test_a_difference_that_seeds_do_not_bear_out_is_no_claim():
    """Contenders differ only by the random part of each run."""

    def final(run):
        shorter = 0.6 * (1500 / run.steps - 1) if run.stage == "steps" else 0.0
        return 2.5 + random.Random(run.text()).gauss(0.0, 0.1) + shorter

    (table,) = decide.summary(raced(LAPTOP, final))
    assert "reached" not in [row[3] for row in table.rows]
    assert table.notes[0] == "By the rules, `recommended` is ppots."


@pytest.mark.parametrize(
    ("known", "place", "expected"),
    [(True, 1.0, "is bell-late."), (True, -1.0, "is ppots."), (False, 0.0, "is not decided")],
)
def test_recommended_is_replaced_by_what_beats_its_own_settings(results, known, place, expected):
    """Runs of its own settings end above or below the winner, or do not exist."""

    def final(run):
        return 2.4 + place + 0.01 * run.seed + 0.001 * (run.seed % 2)

    others = [x for x in results.records if x.run.stage != "incumbent"]
    stages = {"incumbent": incumbent} if known else {}
    found = raced(LAPTOP, final, stages, others)
    (table,) = decide.summary(found)
    assert expected in table.notes[0]
    words = [row[3] for row in table.rows if "as it was" in row[1]]
    assert words == ["reached" if place > 0 else "not reached"] * (3 if known else 0)
    assert len(incumbent.summary(found)) == (4 if known else 0)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([-0.01, 0.0, 0.001], "undecided"),
        ([-0.001, 0.0, 0.001], "reached"),
        ([0.02, 0.021, 0.022], "refuted"),
        ([0.0, 0.01, 0.02], "undecided"),
        ([0.02], "undecided"),
        ([0.0, math.inf], "undecided"),
    ],
)
def test_not_worse_has_three_words(values, word):
    assert decide.not_worse(mean_interval(values)) == word


def test_the_level_is_stricter_where_the_winner_is_chosen(results):
    rows = [row for row in decide.summary(results)[0].rows if "not worse" in row[1]]
    assert [row[1].split()[-1] for row in rows] == ["98.75%", "95.00%", "95.00%"]


def test_tables_of_several_programs_say_so(results):
    first, *rest = results.records
    assert all(not table.notes for table in tune.summary(results))
    mixed = Results(LAPTOP, [dataclasses.replace(first, program="another"), *rest])
    (table,) = tune.summary(mixed)
    assert table.notes[0].startswith("of 2 programs and 1 machines")
    assert "another; program; machine" in table.notes[0]
    assert all(not table.notes for table in transfer.summary(mixed))


def test_tests_of_one_family_are_adjusted(results):
    """A family has 6 differences from `standard`, or 4 of possible winners from the others."""
    tables = confirm.summary(results)
    assert [len(table.rows) for table in tables] == [1 + 6, 1 + 4, 1 + 4]
    for table, size in zip(tables, (6, 4, 4), strict=True):
        p, adjusted = ([float(row[-i]) for row in table.rows[1:]] for i in (2, 1))
        least = min(p)
        assert adjusted[p.index(least)] == pytest.approx(min(1.0, size * least), rel=0.05)
        assert len(table.header) == 1 + 8 + 3  # every seed has a column
        assert all(cell for row in table.rows for cell in row[:9])
    # Other lengths need no adjustment, and one or two seeds give no p value.
    for stage, columns in ((transfer, ["p"]), (STAGES["larger"], []), (others, [])):
        for table in stage.summary(results):
            assert [x for x in table.header if x.startswith("p")] == columns


def test_a_family_is_as_large_as_it_was_planned():
    base = dict.fromkeys(range(4), 3.0)
    a = {seed: 2.9 + 0.01 * seed for seed in base}
    finals = {"base": base, "a": a, "b": a | {3: math.inf}}
    (alone,) = adjusted(finals, "base", ["a"]).values()
    found = adjusted(finals, "base", ["a", "b", "c"])
    assert found["a"] == pytest.approx(3 * alone)
    assert math.isnan(found["b"]) and math.isnan(found["c"])


def test_a_run_that_diverges_leaves_no_claim_and_no_interval():
    def train(run):
        found = record(run, nelbo(run))
        is_bad = run.stage == "confirm" and (run.contender, run.seed) == ("clipped", 3)
        return dataclasses.replace(found, nelbo=found.nelbo[:1]) if is_bad else found

    results = Results(LAPTOP)
    drive(list(RACE.values()), results, train)
    row = next(x for x in confirm.summary(results)[0].rows if x[0] == "clipped")
    assert row.count("diverged") == 2 and row[-2:] == ["-", "-"]  # of the seed, and of the mean
    verdicts = {row[1]: row[3] for row in decide.summary(results)[0].rows[:4]}
    assert verdicts["below clipped"] == "not reached" and verdicts["below standard"] == "reached"


def test_two_workers_do_every_run_once(results):
    begun, lock = [], threading.Lock()

    def train(run):
        with lock:
            begun.append(run)
        return record(run, nelbo(run))

    again = Results(LAPTOP)
    finished = []
    drive(list(RACE.values()), again, train, jobs=2, finished=finished.append)
    assert len(begun) == len(set(begun)) == len(finished)
    assert {x.run for x in finished} == {x.run for x in results.records}


def test_after_a_failure_no_run_begins():
    begun = []

    def train(run):
        begun.append(run)
        if len(begun) == 3:
            raise UserError("the disk is full")
        return record(run, nelbo(run))

    with pytest.raises(UserError, match="the disk is full"):
        drive([tune], Results(LAPTOP), train, jobs=1)
    assert len(begun) == 3


def test_workers_do_not_wait_for_one_whose_result_is_not_kept():
    """The other workers wait for the first result, which makes more runs known."""
    (first,) = tune.runs(Results(CI))[:1]

    class Stage:
        def runs(self, results):
            return [first]

    def finished(record):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        drive([Stage()], Results(CI), lambda run: record(run, 1.0), jobs=3, finished=finished)


def test_data_that_are_there_are_not_written_again(tmp_path):
    paths = [tmp_path / f"text{ending}" for ending in (".bin", ".idx")]

    def written(*texts):
        write_documents(tmp_path / "text", texts)
        return [path.stat().st_ino for path in paths]

    first = written(b"one", b"two")
    assert written(b"one", b"two") == first
    different = written(b"on", b"etwo")
    assert not set(different) & set(first)
    assert not set(written(b"on", b"etwi")) & set(different)


@pytest.mark.parametrize("name", ["race.lock", "other.json.lock"])
def test_one_race_at_a_time_works_on_a_directory_or_a_file(name, tmp_path):
    words = ["--scale", "ci", "--directory", str(tmp_path), "--json", f"{tmp_path}/other.json"]
    with locked(str(tmp_path / name)):
        with pytest.raises(UserError, match=f"{name} cannot be locked .*: another race is at work"):
            race.run(options(*words))
        assert [path.name for path in tmp_path.iterdir()] == [name]


def test_records_of_another_program_stay_until_their_runs_are_trained_anew(tmp_path, monkeypatch):
    earlier = raced(CI, stages={"tune": tune}).records
    path = tmp_path / "race.json"
    path.write_text(json.dumps({"scale": "ci", "runs": [x.as_json() for x in earlier]}))
    trained = []

    def train(run):
        if len(trained) == 2:
            raise UserError("the disk is full")
        trained.append(dataclasses.replace(record(run, 1.0), program="another"))
        return trained[-1]

    monkeypatch.setattr(training, "Trainer", lambda *_: train)
    words = ["--scale", "ci", "--directory", str(tmp_path), "--stages", "tune"]
    with pytest.raises(UserError, match="the disk is full"):
        race.run(options(*words))
    found = [Record.from_json(x) for x in json.loads(path.read_text())["runs"]]
    assert found == trained + earlier[2:] and len(earlier) == 5


def test_held_out_rows_are_of_other_files_and_of_all_of_them(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    held_out, training = data.texts(held_out=True), data.texts(held_out=False)
    assert 8 < len(training) / len(held_out) < 32
    data.held_out_flags(tmp_path, 64, 32)
    rows = IndexedDataset(str(tmp_path / "held_out_64"))
    assert [len(rows[i]) for i in range(len(rows))] == [64] * 32
    text = b"".join(held_out)
    places = [text.index(bytes(rows[i].tolist())) for i in (0, 31)]
    assert places[0] == 0 and places[1] > 0.95 * len(text)
    with pytest.raises(UserError, match="99999999 held-out rows of 64 tokens: .* has [0-9]+"):
        data.held_out_flags(tmp_path, 64, 99999999)


def test_results_come_back_from_a_file(results):
    found = json.loads(json.dumps([x.as_json() for x in results.records]))
    assert [Record.from_json(x) for x in found] == results.records


def options(*words):
    parser = argparse.ArgumentParser()
    race.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--jobs 0", "--jobs 0: must be at least 1"),
        ("--stages tune last", "--stages last: there are tune, confirm"),
        ("--report nothing.json", "nothing.json: is not what --json of the race writes"),
        ("--report nothing.json --figure a.txt", "--figure a.txt: must end in .png or .svg"),
    ],
)
def test_options_that_cannot_work_are_refused(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        race.run(options(*words.split()))
    assert list(tmp_path.iterdir()) == []


def test_the_picture_has_every_contender_and_hides_nothing(results):
    """A run that would squeeze the others is written at the edge."""
    (last, *_) = (run for run in runs_of(results, "confirm") if run.contender == "bell-late")
    off = dataclasses.replace(results[last], nelbo=(*results[last].nelbo[:-1], 99.0))
    with blank_figure() as drawing:
        figure.fill(drawing, Results(LAPTOP, [*results.records, off]))
        shown.check_panels(drawing)
        curves, main, *others = drawing.axes
        lines = {line.get_label(): line for line in curves.lines}
        assert [*lines] == list(LAPTOP.contenders)
        assert len({(x.get_color(), x.get_marker()) for x in lines.values()}) == len(lines)
        assert main.get_xlim()[1] < 1.0
        difference = 99.0 - next(
            results[run].final
            for run in runs_of(results, "confirm")
            if (run.contender, run.seed) == ("standard", last.seed)
        )
        assert [text.get_text() for text in main.texts] == [f"{difference:.3g}"]
        assert not any(axes.texts for axes in others)


def test_the_picture_leaves_out_shapes_without_differences(results):
    """Shapes without runs, and shapes with runs of `standard` alone."""
    stages = ("tune", "confirm", "transfer")
    tuned, confirmed, transferred = (
        [x for x in results.records if x.run.stage == stage] for stage in stages
    )
    alone, base = (
        [x for x in records if x.run.contender == "standard"]
        for records in (transferred, confirmed)
    )
    assert alone and base and len(LAPTOP.transfer) > 1
    main, last = LAPTOP.main.name(), LAPTOP.transfer[-1]
    of_last = [x for x in transferred if x.run in transfer.of_shape(results, last)]
    for records, titles in (
        ([*confirmed, *of_last], [main, main, last.name()]),
        ([*confirmed, *alone], [main, main]),
        (base, [main]),
    ):
        with blank_figure() as drawing:
            figure.fill(drawing, Results(LAPTOP, [*tuned, *records]))
            shown.check_panels(drawing)
            assert [axes.get_title() for axes in drawing.axes] == titles


def test_a_report_is_printed_drawn_and_inserted(results, tmp_path, capsys):
    path, page, picture = (tmp_path / name for name in ("race.json", "page.md", "race.svg"))
    value = {"scale": "laptop", "runs": [x.as_json() for x in results.records]}
    path.write_text(json.dumps(value))
    text = "a\n<!-- race: claims -->\nold\n<!-- end -->\nb\n<!-- race: caption --><!-- end -->\n"
    page.write_text(text.replace("caption -->", "caption -->\n"))
    words = ["--report", str(path), "--figure", str(picture), "--insert", str(page)]
    race.run(options(*words))
    out = capsys.readouterr().out
    assert f"{len(results.records)} runs of" in out and "on machine; program" in out
    for word in (
        "tune: 128 x 16",
        "confirm: ",
        "transfer: ",
        "steps: bell-late",
        "incumbent: ",
        "claims",
    ):
        assert word in out
    inserted = page.read_text()
    assert "old" not in inserted and "| not reached |" in inserted and "on machine" in inserted
    race.run(options(*words))
    assert page.read_text() == inserted
    assert picture.read_text().count("<svg") == 1
    page.write_text("nothing")
    with pytest.raises(UserError, match="needs <!-- race: NAME -->"):
        race.run(options(*words))


def test_the_tool_prints_the_plan(tmp_path):
    tool = [sys.executable, "tools/benchmark.py", "race", "--plan", "--directory", str(tmp_path)]
    run = subprocess.run(tool, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    confirmed = [x for x in run.stdout.splitlines() if "confirm: bell-fade, 128 x 16" in x]
    assert len(confirmed) == 8 and "core-hours" in run.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ranks
@pytest.mark.timeout(900)
def test_the_whole_race_at_seconds_a_run(tmp_path, capsys):
    """Every stage trains. Finished runs are kept, and other stages are read from the file."""
    words = ["--scale", "ci", "--directory", str(tmp_path), "--jobs", "2", "--stages"]
    race.run(options(*words, "tune", "confirm"))
    path = tmp_path / "race.json"
    first = json.loads(path.read_text())["runs"]
    assert len(first) == 5 + 10 and all(len(x["nelbo"]) == 6 for x in first)
    assert {x["program"] for x in first} == {program()}
    kept = {log: log.stat().st_mtime_ns for log in tmp_path.glob("*.log")}
    race.run(options(*words, *RACE))
    assert all(log.stat().st_mtime_ns == time for log, time in kept.items())
    results = json.loads(path.read_text())["runs"]
    assert len(results) == len(list(tmp_path.glob("*.log"))) == 15 + 5 + 3 + 4 + 1 + 3
    assert "claim on " in capsys.readouterr().out
    # A single stage reads the results of the others, whichever program they are from.
    path.write_text(path.read_text().replace(program(), "an earlier program"))
    race.run(options(*words, "others"))
    programs = [x["program"] for x in json.loads(path.read_text())["runs"]]
    assert programs.count("an earlier program") == len(results) - 1
    race.run(options(*words, *RACE, "--plan"))
    assert "all             31    31" in capsys.readouterr().out
    with pytest.raises(UserError, match="race.json is not of --scale laptop: give another file"):
        race.run(options("--directory", str(tmp_path)))
