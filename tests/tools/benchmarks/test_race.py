"""The race: what is trained, what is kept, and what is made of the curves."""

import argparse
import json
import sys

import pytest

from benchmarks import race
from megatron_mdm.errors import UserError
from megatron_mdm.experiments import runs
from megatron_mdm.mcore.flags import arguments
from tests import ranks


def options(directory, *words):
    parser = argparse.ArgumentParser()
    race.add_arguments(parser)
    return parser.parse_args(["--directory", str(directory), *words])


def test_no_competitor_has_the_settings_of_another():
    settings = [str(sorted(settings.items())) for settings in race.COMPETITORS.values()]
    assert len(set(settings)) == len(settings)


def test_steps_to_a_target_are_interpolated():
    curve = [5.0, 3.0, 2.0]
    assert race.steps_to(curve, 2.5, 100) == 250
    assert race.steps_to(curve, 2.0, 100) == 300
    assert race.steps_to(curve, 6.0, 100) == 100  # nothing is known before the first value
    assert race.steps_to(curve, 1.9, 100) is None


def test_the_results_of_a_race(tmp_path, monkeypatch):
    """In the place of each run its log: NELBO falls to 3, for `paper` twice as fast, to 2."""
    trained = []

    def run_python(command, log, name):
        trained.append(name)
        fall = 2 if "--mdm-views 2" in " ".join(command) else 1
        steps = range(1, race.EVALUATIONS + 1)
        values = [4 - fall * i / race.EVALUATIONS for i in steps]
        return "".join(f" validation NELBO: {value:.4f} +- 0.1 nats/token\n" for value in values)

    monkeypatch.setattr(race, "run_python", run_python)
    words = "--steps 200 --seeds 1 2 --competitors paper recommended".split()
    words += ["--json", str(tmp_path / "race.json")]
    race.run(options(tmp_path / "runs", *words))
    assert len(trained) == 6
    results = json.loads((tmp_path / "race.json").read_text())
    assert list(results) == ["standard", "paper", "recommended"]
    assert results["standard"]["1"] == {"final_nelbo": 3.0, "steps_to_standard_final": 200}
    assert results["paper"]["2"] == {"final_nelbo": 2.0, "steps_to_standard_final": 100}
    assert results["recommended"] == results["standard"]
    # What was finished is kept; another setting is another run.
    race.run(options(tmp_path / "runs", *words))
    assert len(trained) == 6
    race.run(options(tmp_path / "runs", *words, "--clip-grad", "0"))
    assert len(trained) == 12
    # So is the same one by another program, or on other data.
    write_data = race.write_data

    def shorter(directory):
        write_data(directory)
        ranks.write_documents(directory / "text", ranks.random_documents(3))

    monkeypatch.setattr(race, "write_data", shorter)
    race.run(options(tmp_path / "runs", *words))
    assert len(trained) == 18
    for name in ("program", "program_now"):
        monkeypatch.setattr(runs, name, lambda: "another")
    race.run(options(tmp_path / "runs", *words))
    assert len(trained) == 24


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps 30", "--steps 30: must be a multiple of 20"),
        ("--jobs 0", "--jobs 0: must be at least 1"),
        ("--batch 0", "--batch 0: must be at least 1"),
    ],
)
def test_numbers_that_cannot_work_are_refused(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        race.run(options(tmp_path / "runs", *words.split()))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", race.COMPETITORS)
def test_flags_of_every_competitor_are_accepted(name, tmp_path, monkeypatch):
    flags = race._flags(options(tmp_path), tmp_path, 1)
    monkeypatch.setattr(sys, "argv", ["pretrain", *flags, *race.as_flags(race.COMPETITORS[name])])
    arguments.validate_flags(arguments.parse_args(arguments.add_arguments))
