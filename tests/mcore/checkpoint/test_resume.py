"""A run that stops and resumes under another layout each time equals an uninterrupted run.

So does a run that moves from GPTModel to HybridModel on the way.

All parts have the same flags. They include --pretrained-checkpoint, from which only the first part
starts.
"""

import pytest
import torch

from megatron_mdm.objective.randomness import Split
from tests import ranks

TRAIN = [
    # Epsilon is large, because Adam otherwise turns the rounding of a vanishing gradient into a
    # step of full size, and weights could not be compared element by element.
    *"--optimizer adam --adam-eps 1e-2 --lr 1e-2 --use-distributed-optimizer".split(),
    *"--dist-ckpt-optim-fully-reshardable --save-interval 2 --eval-interval 2".split(),
    *"--eval-iters 1 --lr-decay-style linear".split(),
]
LAYOUTS = [
    "--tensor-model-parallel-size 2",
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    "",  # DP 2
]
# Flags of all parts, or of the parts after the first.
LATER = {"HybridModel from the second part on": ["--mdm-model", "hybrid"]}
SCHEDULES = {
    "fixed batch": "--global-batch-size 8 --train-iters 6 --lr-warmup-iters 1".split(),
    "HybridModel from the second part on": (
        "--global-batch-size 8 --train-iters 6 --lr-warmup-iters 1".split()
    ),
    # Thresholds are in tokens, 32 per row. A step has 4 rows at first and 8 from the 13th row on,
    # which is in the middle of the second part. Megatron then counts its schedules in samples.
    "batch-size schedule": [
        *["--step-batch-size-schedule", "0:4 384:8"],
        *"--train-samples 36 --lr-warmup-samples 4 --eval-global-batch-size 8".split(),
    ],
}


@pytest.fixture(scope="module", params=SCHEDULES)
def runs(request, tmp_path_factory, base, data):
    directory = tmp_path_factory.mktemp("resume")
    flags = [*TRAIN, *SCHEDULES[request.param]]
    data_flags = base[: base.index("--load")]

    def run(name, count, *more):
        return ranks.launch(
            directory / name,
            count,
            *data_flags,
            *flags,
            *more,
            drop=["--global-batch-size", "--train-iters"],
        )

    whole = run("whole", 1, *base[base.index("--load") :], "--save", str(directory / "whole_ckpt"))
    checkpoint = str(directory / "checkpoint")
    source = ["--pretrained-checkpoint", base[base.index("--load") + 1], "--load", checkpoint]
    parts = []
    for i, layout in enumerate(LAYOUTS):
        stop = ["--exit-interval", "2"] if i < 2 else []
        stop += LATER.get(request.param, []) if i else []
        parts.append(run(f"part{i}", 2, *layout.split(), *source, "--save", checkpoint, *stop))
    return (
        whole,
        parts,
        ranks.weights(directory / "whole_ckpt"),
        ranks.weights(directory / "checkpoint"),
    )


def split(run, which):
    return {key: value for key, value in run.masks().items() if key[0] == which}


def test_losses_and_gradient_norms_go_on(runs):
    whole, parts, *_ = runs
    losses = [x for part in parts for x in part.losses]
    assert len(losses) == 6
    assert losses == pytest.approx(whole.losses, rel=1e-5)
    norms = [x for part in parts for x in part.grad_norms]
    assert norms == pytest.approx(whole.grad_norms, rel=1e-4)


def test_rows_and_masks_go_on(runs):
    whole, parts, *_ = runs
    merged = {}
    for part in parts:
        training = split(part, Split.TRAIN)
        assert not merged.keys() & training.keys(), "a row was trained twice"
        merged |= training
    assert merged == split(whole, Split.TRAIN)


def test_learning_rate_and_batch_size_go_on(runs):
    whole, parts, *_ = runs
    for name in ("learning-rate", "batch-size"):
        assert [x for part in parts for x in part.scalars[name]] == whole.scalars[name]


def test_final_weights_are_equal(runs):
    *_, expected, actual = runs
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=2e-6, msg=name)


def test_validation_uses_the_same_rows_under_the_same_masks(runs):
    whole, parts, *_ = runs
    assert len(split(whole, Split.VALID)) == 8
    for part in parts:
        assert split(part, Split.VALID) == split(whole, Split.VALID)
    values = [x for part in parts for x in part.scalars["mdm loss validation"]]
    assert values == pytest.approx(whole.scalars["mdm loss validation"], rel=1e-5)
