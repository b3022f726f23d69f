"""A loss that is no number ends the run with one line, and is neither trained on nor saved."""

import pytest

from tests import ranks
from tests.mcore.flags.test_bad_input import the_error_line

STEPS = "--train-iters 6 --save-interval 1".split()


def latest(directory):
    return (directory / "latest_checkpointed_iteration.txt").read_text()


def test_the_last_good_checkpoint_stays_the_latest(base, tmp_path):
    """Megatron would save one of the iteration that failed, at which every start then ends.

    The checkpoint before may still be on its way to the disk.
    """
    save = tmp_path / "checkpoint"
    flags = [*base, *STEPS, "--save", str(save), "--async-save"]
    run = ranks.launch(tmp_path / "run", 2, *flags, entry="nan_from_third_iteration", check=False)
    assert 2 in run.status
    # Rows 16 and 17 are of rank 0 in the third iteration.
    assert the_error_line(run.output).startswith(
        "error: iteration 3, rank 1: the loss of row 19 is nan, and again when it was computed a "
        "second time. Nothing of this iteration is saved: the same command goes on from"
    )
    assert latest(save) == "2" and not (save / "iter_0000003").exists()
    run = ranks.launch(tmp_path / "again", 2, *flags)
    assert len(run.losses) == 4 and latest(save) == "6"


@pytest.mark.parametrize("rerun", [True, False])
def test_the_first_iteration_after_a_start(base, tmp_path, rerun):
    """Megatron leaves it unchecked."""
    save = tmp_path / "checkpoint"
    flags = [*base, *STEPS, "--save", str(save), *([] if rerun else ["--rerun-mode", "disabled"])]
    run = ranks.launch(tmp_path / "run", 1, *flags, entry="nan_row", check=False)
    assert run.status == [2]
    line = the_error_line(run.output)
    assert line.startswith(
        "error: iteration 1, rank 0: the loss of row 0 is nan, and another value when it was "
        "computed a second time, as where a GPU is faulty. "
        if rerun
        else "error: iteration 1, training: the loss of row 0 is nan. Nothing of this"
    )
    assert not list(save.glob("iter_*"))


def test_a_gradient_of_an_early_stage_in_the_first_iteration(base, tmp_path):
    save = tmp_path / "checkpoint"
    flags = [*base, *STEPS, "--save", str(save), "--pipeline-model-parallel-size", "2"]
    run = ranks.launch(tmp_path, 2, *flags, entry="nan_gradient_of_first_stage", check=False)
    assert the_error_line(run.output).startswith(
        "error: iteration 1, rank 0: found NaN in local grad norm for bucket #0"
    )
    assert not list(save.glob("iter_*"))
