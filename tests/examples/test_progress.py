"""The progress that examples show during a step, and their message when it fails."""

import re
import subprocess
import sys
import time

import pytest

from megatron_mdm.errors import UserError
from megatron_mdm.experiments.runs import iteration_in, run_python
from tests import ROOT

# Replaces `sleep` in the script that shows progress. The step waits for lines that it has shown.
SCRIPT = """set -euo pipefail
source examples/progress.sh
sleep() { command sleep 0.05; }
step() {
    echo "[12:00] iteration       20/     500 | consumed samples"
    until grep -q "iteration 20 of 500" "$2"; do command sleep 0.05; done
    [ "$1" = works ] || {
        echo "error: rank 1: --flag is wrong"
        echo "[rank0]: RuntimeError: Connection closed by peer"
        echo "===="
        return 3
    }
}
exec 2>"$2"
run_logged "$3" step "$1" "$2"
echo after
"""


@pytest.mark.parametrize("kind", ["works", "fails"])
def test_a_step_shows_where_it_is_and_a_failure_its_reason(kind, tmp_path):
    shown, log = tmp_path / "shown", tmp_path / "step.log"
    command = ["bash", "-c", SCRIPT, "script", kind, str(shown), str(log)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    lines = shown.read_text().splitlines()
    # A loaded machine may need a second or more.
    progress = re.compile(rf" *\d+ s, iteration 20 of 500 \(log: {re.escape(str(log))}\)")
    assert any(progress.fullmatch(line) for line in lines)
    wrong = f"error: rank 1: --flag is wrong (all of the output is in {log})"
    assert (run.returncode, run.stdout, lines[-1] == wrong) == (
        (0, "after\n", False) if kind == "works" else (3, "", True)
    )


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("error: --flag is wrong\nValueError: later", ", whose last error is: --flag is wrong"),
        ("ValueError: first\nmore", ", whose last error is: ValueError: first"),
        ("nothing", ""),
    ],
)
def test_a_run_that_fails_says_its_last_error(output, said, tmp_path):
    (tmp_path / "run.py").write_text(f"import sys\nprint({output!r})\nsys.exit(1)\n")
    log = tmp_path / "log"
    with pytest.raises(UserError) as caught:
        run_python([str(tmp_path / "run.py")], log, "the run")
    assert str(caught.value) == f"the run failed: its output is in {log}{said}"


def test_a_study_shows_what_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples/reproduce"))
    import study
    from methods import SCALES

    some = study.Study(SCALES["ci"], tmp_path, "cpu")
    log = tmp_path / "log"
    seen = []

    def runs(command, path, name):
        assert iteration_in(path) == "" and some.progress(1000.0) == []
        seen.extend(some.progress(0.0))
        path.write_text(" iteration        9/      10 | \n iteration       10/      10 | \n")
        seen.extend(some.progress(0.0))
        raise UserError("failed")

    monkeypatch.setattr(study, "run_python", runs)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    with pytest.raises(UserError):
        some._run([sys.executable], log, "base 1")
    assert seen == [
        f"   base 1: 0 s, running (log: {log})",
        f"   base 1: 0 s, iteration 10 of 10 (log: {log})",
    ]
    assert some.progress(0.0) == []
