"""tools/plot_run.py on runs that the tests write."""

import math
import runpy
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_mdm.experiments.runs import read_scalars
from megatron_mdm.pictures import BLUE, ORANGE, PALE, blank_figure
from tests import ROOT, ranks, shown

PLOT = runpy.run_path(str(ROOT / "tools/plot_run.py"))
SETS = "Validation sets +- standard error"


def write_run(directory, validations):
    """Writes a run of 60 steps. Like Megatron, it writes the last validation twice."""
    writer = SummaryWriter(str(directory))
    for step in range(60):
        writer.add_scalar("mdm loss", 5 - step / 20, step)
        writer.add_scalar("grad-norm", 1.0, step)
    for step in [*validations, validations[-1]]:
        for name in ("NELBO", "loss at t 0.00-0.50", "loss at t 0.50-1.00"):
            writer.add_scalar(f"mdm/validation {name}", 5 - step / 20, step)
        writer.add_scalar("mdm/validation NELBO stderr", 0.125, step)
    writer.close()


def plot(directory, output):
    words = ["--tensorboard-dir", str(directory), "--output", str(output)]
    return ranks.run_forked("tools/plot_run.py", *words)


@pytest.mark.parametrize(
    ("validations", "named"),
    [([0, 60], ["before", "after"]), ([60], ["after"]), ([30, 60], ["first", "after"])],
)
def test_first_and_last_validation_are_shown_once(tmp_path, validations, named):
    write_run(tmp_path / "run", validations)
    words = ["--tensorboard-dir", str(tmp_path / "run"), "--output", str(tmp_path / "run.png")]
    printed = ranks.run_tool("plot_run", *words)
    lines = [line for line in printed.splitlines() if line.startswith("validation NELBO")]
    assert [line.split()[2] for line in lines] == named
    assert lines[-1].endswith("(60 steps): 2.000 +- 0.125 nats/token")
    assert 5_000 < (tmp_path / "run.png").stat().st_size < 150_000


def test_bad_output_is_one_line_and_missing_directories_are_made(tmp_path):
    write_run(tmp_path / "run", [60])
    run = plot(tmp_path / "run", tmp_path / "run.foo")
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].endswith("run.foo: must end in .png, .svg or .pdf")
    (tmp_path / "file").write_text("")
    run = plot(tmp_path / "run", tmp_path / "file" / "run.png")
    assert run.returncode == 2 and "error: cannot write" in run.stderr.splitlines()[-1]
    run = plot(tmp_path / "run", tmp_path / "new" / "run.svg")
    assert run.returncode == 0, run.stderr
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["run.svg"]


def test_a_directory_without_a_run_is_one_line(tmp_path):
    run = plot(tmp_path, tmp_path / "run.png")
    assert run.returncode == 2 and "has no run of megatron_mdm" in run.stderr.splitlines()[-1]
    for path in (tmp_path / "none", Path(__file__)):
        run = plot(path, tmp_path / "run.png")
        assert run.returncode == 2
        assert run.stderr == f"error: --tensorboard-dir {path}: no such directory\n"
    events = tmp_path / "odd" / "events.out.tfevents.1"
    events.mkdir(parents=True)
    run = plot(events.parent, tmp_path / "run.png")
    assert run.returncode == 2
    line = f"error: --tensorboard-dir {events.parent} cannot be read: Is a directory ({events})"
    assert run.stderr.splitlines()[-1] == line and "Traceback" not in run.stderr
    assert not (tmp_path / "run.png").exists()


def test_a_validation_without_training_is_printed_and_not_drawn(tmp_path):
    """A run with --skip-train."""
    writer = SummaryWriter(str(tmp_path / "run"))
    writer.add_scalar("mdm/validation NELBO", 2.0, 1)
    writer.add_scalar("mdm/validation NELBO stderr", 0.125, 1)
    writer.close()
    run = plot(tmp_path / "run", tmp_path / "run.png")
    assert run.returncode == 2
    assert run.stdout == "validation NELBO after  (1 step): 2.000 +- 0.125 nats/token\n"
    assert run.stderr.splitlines()[-1] == (
        f"error: --tensorboard-dir {tmp_path / 'run'} holds a validation and no training: "
        "there is nothing to draw yet"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def scalars(steps, validations=(0,), **more):
    """Scalars that a run logs, by name. `more` adds or replaces some."""
    values = {
        "mdm loss": [(step, 3 + 5 * math.exp(-step / 50)) for step in steps],
        "grad-norm": [(step, 1 + step % 3) for step in steps],
        "learning-rate": [(step, 1e-6 * step / len(steps)) for step in steps],
        "mdm/rows per s": [(step, 50.0) for step in steps if step % 10 == 0],
        "mdm/masked fraction": [(step, 0.5) for step in steps if step % 10 == 0],
        "mdm/validation NELBO": [(step, 4.0) for step in validations],
        "mdm/validation NELBO stderr": [(step, 0.25) for step in validations],
    }
    for low in (0.0, 0.5):
        name = f"mdm/validation loss at t {low:.2f}-{low + 0.5:.2f}"
        values[name] = [(step, 3.5 + low + step / 100) for step in validations]
    return {name: found for name, found in (values | more).items() if found}


@pytest.fixture
def panels():
    """A function that draws, checks that nothing is hidden, and returns the panels by title."""
    with blank_figure() as figure:

        def drawn(values):
            series = {name: PLOT["in_order"](found) for name, found in values.items()}
            PLOT["draw"](figure, series)
            shown.check_panels(figure)
            return {axes.get_title(): axes for axes in figure.axes}

        yield drawn


def line(axes, color):
    """The points of the only curve in a colour."""
    found = [x for x in axes.lines if x.get_color() == color and len(x.get_xdata())]
    assert len(found) == 1
    return found[0].get_xydata()


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_all_that_is_logged_is_drawn(panels):
    density = {
        f"mdm/density at t {t:.2f}": [(step, t + step) for step in (20, 40)] for t in (0.25, 0.75)
    }
    found = panels(scalars(range(1, 101), [0, 50, 100], **density))
    assert list(found) == [
        *("Loss", "Loss against t", "Gradient", "Density of the rate"),
        *("Throughput", "Masking", "Learning rate"),
    ]
    rates = line(found["Learning rate"], BLUE)
    assert rates == pytest.approx(np.array([(x, 1e-6 * x / 100) for x in range(1, 101)]))
    first, last = (x.get_xydata() for x in found["Density of the rate"].lines)
    assert first.tolist() == [[0.25, 20.25], [0.75, 20.75]]
    assert last.tolist() == [[0.25, 40.25], [0.75, 40.75]]
    assert legend(found["Density of the rate"]) == ["after 20 steps", "after 40 steps"]
    # No panel includes 0 without need.
    assert found["Loss against t"].get_ylim()[0] > 3 and found["Loss"].get_ylim()[0] > 2
    assert found["Masking"].get_ylim()[0] > 0.4 and found["Throughput"].get_ylim()[0] > 40


def test_numbers_at_the_ticks_are_plain(panels):
    found = panels(scalars(range(1, 101), [0, 100]))
    words = {
        title: [tick.get_text() for tick in axes.get_yticklabels()] for title, axes in found.items()
    }
    assert "1e-6" in words["Learning rate"] and "1" in words["Gradient"]
    for axes in found.values():
        for axis in (axes.xaxis, axes.yaxis):
            assert axis.get_offset_text().get_text() == ""
            assert not any("$" in tick.get_text() for tick in axis.get_ticklabels(which="both"))


def test_only_a_validation_at_step_0_is_called_one_before_training(panels):
    assert legend(panels(scalars([1, 2], [0, 2]))["Loss against t"]) == [
        "before training",
        "after 2 steps",
    ]
    assert (PLOT["when"](1), PLOT["when"](2)) == ("after 1 step", "after 2 steps")


def test_the_mean_does_not_lag_and_skips_what_is_not_a_number(panels):
    """A straight line equals its mean at the middle of each window, whatever values are missing."""
    steps = range(1, 161)
    values = [(step, math.nan if step in (80, 81) else 10.0 - step / 20) for step in steps]
    loss = panels(scalars(steps, **{"mdm loss": values}))["Loss"]
    mean = line(loss, BLUE)
    assert mean[0, 0] == 6 and mean[-1, 0] == 155  # windows have 11 steps
    far = np.abs(mean[:, 0] - 80.5) > 7
    assert mean[far, 1] == pytest.approx(10.0 - mean[far, 0] / 20)
    assert np.isfinite(mean).all()
    pale = line(loss, PALE)
    assert np.isnan(pale[79:81, 1]).all() and np.isfinite(pale).sum() == 2 * 160 - 2
    assert "mean of 11 logged steps, at the middle one" in legend(loss)
    ends = PLOT["centred_mean"](np.array([1.0, np.nan, 3.0, np.nan, np.nan, np.nan]), 3)
    assert ends.tolist()[:3] == [2.0, 3.0, 3.0] and np.isnan(ends[3])


def test_every_named_set_has_its_points_and_error_bars(panels):
    """They have their own panel, where the training curve does not squeeze them."""
    steps, names = (0, 50, 100), ("_web", "code")
    sets = {
        f"mdm/validation {name} NELBO{end}": [(step, i + value) for step in steps]
        for i, name in enumerate(names)
        for end, value in (("", 2.0), (" stderr", 1.0))
    }
    found = panels(scalars(range(1, 101), steps, **sets))
    assert legend(found["Loss"])[2:] == ["validation, mean of its sets +- standard error"]
    bars = {bar.get_label(): bar for bar in found[SETS].containers}
    assert [*bars] == legend(found[SETS]) == ["mean of the sets", "set _web", "set code"]
    for bar, (value, error) in zip(bars.values(), ((4, 0.25), (2, 1), (3, 2)), strict=True):
        assert bar[0].get_xydata().tolist() == [[step, value] for step in steps]
        assert bar[0].get_linestyle() == "-"
        segments = [segment.tolist() for segment in bar[2][0].get_segments()]
        assert segments == [[[step, value - error], [step, value + error]] for step in steps]
    (whole,) = found["Loss"].containers
    assert whole[0].get_xydata().tolist() == [[step, 4] for step in steps]
    segments = [segment.tolist() for segment in whole[2][0].get_segments()]
    assert segments == [[[step, 3.75], [step, 4.25]] for step in steps]
    assert whole[0].get_color() == bars["mean of the sets"][0].get_color() == ORANGE


def test_without_named_sets_there_is_one_validation(panels):
    found = panels(scalars(range(1, 101), [0, 50]))
    assert SETS not in found
    assert legend(found["Loss"])[2:] == ["validation +- standard error"]


@pytest.mark.parametrize("length", [1, 16, 40])
def test_many_named_sets_look_different(panels, length):
    many = {
        f"mdm/validation {'x' * length}{x} NELBO{end}": [(50, 2.0)]
        for x in range(12)
        for end in ("", " stderr")
    }
    sets = panels(scalars(range(1, 101), [50], **many))[SETS]
    looks = {(bar[0].get_color(), bar[0].get_marker()) for bar in sets.containers}
    assert len(looks) == len(sets.containers) == 13


@pytest.mark.parametrize("norms", [[0.0, 2.0], [1e-12, 3e9], [0.0], [math.nan], []])
def test_gradients_of_any_size_are_drawn(panels, norms):
    """There is no panel if no norm was logged, or none that a logarithmic axis can show."""
    values = [(step, norms[step % len(norms)]) for step in range(1, 61) if norms]
    found = panels(scalars(range(1, 61), [60], **{"grad-norm": values}))
    assert ("Gradient" in found) == (max(norms, default=0.0) > 0)


def test_a_resumed_run_has_each_step_once(panels, tmp_path):
    """There are two files. The second run begins at the checkpoint before the first one's end."""
    for start, end, name in ((1, 30, "a"), (21, 50, "b")):
        writer = SummaryWriter(str(tmp_path), filename_suffix=name)
        for step in range(start, end + 1):
            writer.add_scalar("mdm loss", step + (0.5 if name == "b" else 0.0), step)
        writer.close()
    found = read_scalars(str(tmp_path))["mdm loss"]
    assert len(found) == 60
    steps, values = PLOT["in_order"](found)
    assert steps.tolist() == list(range(1, 51))
    assert values.tolist() == [*range(1, 21), *(step + 0.5 for step in range(21, 51))]
    # A bin that has no rows in a validation leaves a gap.
    more = {"mdm/validation loss at t 0.00-0.50": [(50, 3.0)]}
    first, last = panels(scalars(range(1, 51), [0, 50], **more))["Loss against t"].lines
    assert np.isnan(first.get_ydata()[0]) and last.get_ydata().tolist() == [3.0, 4.5]


@pytest.mark.parametrize("steps", [1, 2, 100_000])
def test_very_short_and_very_long_runs(panels, steps):
    found = panels(scalars(range(1, steps + 1), [steps]))
    assert legend(found["Loss against t"]) == [
        "after 1 step" if steps == 1 else f"after {steps} steps"
    ]
    for title in ("Loss", "Gradient", "Learning rate"):
        ticks, (first, last) = found[title].get_xticks(), found[title].get_xlim()
        assert [x for x in ticks if first <= x <= last and x != round(x)] == []
        assert steps > 1 or (first, last) == (0.5, 1.5)
    pale = [x for x in found["Loss"].lines if x.get_color() == PALE]
    assert (pale[0].get_marker() == "o") == (steps < 30)
