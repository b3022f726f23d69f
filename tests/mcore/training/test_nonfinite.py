"""A NaN or infinite loss ends the run with one line, and is neither trained on nor saved."""

import os

import pytest
import torch

from megatron_mdm.mcore.training import forward_step as step
from megatron_mdm.mcore.training import objective as program
from megatron_mdm.pretrain import main
from tests import ranks
from tests.mcore.training.nan_rows import nan_row

STEPS = "--train-iters 6 --save-interval 1".split()


def latest(directory):
    return (directory / "latest_checkpointed_iteration.txt").read_text()


def nan_from_third_iteration() -> None:
    """Runs the program with a NaN row on the last rank, two micro-batches per iteration."""
    logits_to_tokens, calls = step.logits_to_tokens, []

    def with_nan(*words):
        values = logits_to_tokens(*words)
        calls.append(values)
        if len(calls) <= 4 or os.environ["RANK"] == "0":
            return values
        return values * torch.ones_like(values).index_fill(0, torch.tensor([1]), torch.nan)

    step.logits_to_tokens = with_nan
    main()


def nan_gradient_of_first_stage() -> None:
    """Runs the program; the first rank receives NaN gradients from the next stage."""
    forward_step = program.forward_step

    def with_nan(*args):
        output, loss = forward_step(*args)
        if os.environ["RANK"] == "0":
            output.register_hook(lambda gradient: gradient * torch.nan)
        return output, loss

    program.forward_step = with_nan
    main()


def test_the_last_good_checkpoint_stays_the_latest(base, tmp_path):
    """Megatron would save the iteration that failed, and every restart would end there.

    The checkpoint before it may still be on its way to the disk.
    """
    save = tmp_path / "checkpoint"
    flags = [*base, *STEPS, "--save", str(save), "--async-save"]
    run = ranks.launch(tmp_path / "run", 2, *flags, entry=nan_from_third_iteration, check=False)
    assert 2 in run.status
    # In the third iteration, rank 0 has rows 16 and 17.
    assert ranks.the_error_line(run.output).startswith(
        "error: iteration 3, rank 1: the loss of row 19 is nan, and again when it was computed a "
        "second time. Nothing of this iteration is saved: the same command goes on from"
    )
    assert latest(save) == "2" and not (save / "iter_0000003").exists()
    run = ranks.launch(tmp_path / "again", 2, *flags)
    assert len(run.losses) == 4 and latest(save) == "6"


@pytest.mark.parametrize("rerun", [True, False])
def test_the_first_iteration_after_a_start(base, tmp_path, rerun):
    """Megatron does not check this iteration."""
    save = tmp_path / "checkpoint"
    flags = [*base, *STEPS, "--save", str(save), *([] if rerun else ["--rerun-mode", "disabled"])]
    run = ranks.launch(tmp_path / "run", 1, *flags, entry=nan_row, check=False)
    assert run.status == [2]
    line = ranks.the_error_line(run.output)
    assert line.startswith(
        "error: iteration 1, rank 0: the loss of row 0 is nan, and another value when it was "
        "computed a second time, which suggests a faulty GPU. "
        if rerun
        else "error: iteration 1, training: the loss of row 0 is nan. Nothing of this"
    )
    assert not list(save.glob("iter_*"))


def test_a_gradient_of_an_early_stage_in_the_first_iteration(base, tmp_path):
    save = tmp_path / "checkpoint"
    flags = [*base, *STEPS, "--save", str(save), "--pipeline-model-parallel-size", "2"]
    run = ranks.launch(tmp_path, 2, *flags, entry=nan_gradient_of_first_stage, check=False)
    assert ranks.the_error_line(run.output).startswith(
        "error: iteration 1, rank 0: found NaN in local grad norm for bucket #0"
    )
    assert not list(save.glob("iter_*"))
