"""tools/plot_run.py on a run of its own making."""

from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from tests import ranks


def write_run(directory, validations):
    """A run of 60 steps; Megatron writes the last validation twice."""
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
    ("validations", "shown"), [([0, 60], ["before", "after"]), ([60], ["after"])]
)
def test_first_and_last_validation_are_shown_once(tmp_path, validations, shown):
    write_run(tmp_path / "run", validations)
    words = ["--tensorboard-dir", str(tmp_path / "run"), "--output", str(tmp_path / "run.png")]
    printed = ranks.run_tool("plot_run", *words)
    lines = [line for line in printed.splitlines() if line.startswith("validation NELBO")]
    assert [line.split()[2] for line in lines] == shown
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
