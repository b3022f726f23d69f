"""The lines of the README with which a script of one's own registers the objective."""

import pytest

from tests import ranks


def test_readme_script_trains_as_the_program_does(base, tmp_path):
    script = ranks.launch(tmp_path / "script", 1, *base, entry="readme_script")
    program = ranks.launch(tmp_path / "program", 1, *base)
    assert len(script.losses) == 5
    assert script.losses == program.losses
    assert script.grad_norms == program.grad_norms


def test_logs_show_loss_per_rate_masked_fraction_and_speed(base, tmp_path):
    flags = ["--log-interval", "2", "--eval-iters", "2", "--mdm-rate-bins", "4"]
    run = ranks.launch(tmp_path, 2, *base, *flags, "--pipeline-model-parallel-size", "2")
    bins = [f"mdm/loss at t {i / 4:.2f}-{(i + 1) / 4:.2f}" for i in range(4)]
    for name in (*bins, "mdm/masked fraction"):
        assert len(run.scalars[name]) == 2, name  # iterations 2 and 4
    assert len(run.scalars["mdm/rows per s"]) == 1  # not for the first interval: it has the start
    assert run.scalars["mdm/tokens per s"][0] == pytest.approx(
        32 * run.scalars["mdm/rows per s"][0], rel=1e-6
    )
    # Rates of 16 rows from the lattice: masked fraction and rates lie near 1/2.
    assert run.scalars["mdm/masked fraction"] == pytest.approx([0.5, 0.5], abs=0.1)
    line = next(x for x in run.output[1].splitlines() if "mdm iteration        2" in x)
    assert "masked fraction" in line
    assert "0.12: " in line and "0.88: " in line
    # Token-normalised and row-normalised means agree where all rows have equally many tokens.
    nelbo = run.scalars["mdm/validation NELBO"][-1]
    assert f"mdm loss value: {nelbo:.3E}"[:20] in "\n".join(run.output)
    assert run.scalars["mdm/validation NELBO stderr"][-1] > 0
