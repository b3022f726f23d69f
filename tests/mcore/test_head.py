"""The head at masked positions gives what the head at all positions gives, and less work."""

import sys

import pytest
import torch

from megatron_mdm.errors import UserError
from megatron_mdm.mcore import arguments
from megatron_mdm.mcore.head import ROW_MULTIPLE, HeadContext, MaskedPositions, head
from tests import ranks

LAYOUTS = {
    "1 rank": (1, ""),
    "DP 2": (2, ""),
    "TP 2": (2, "--tensor-model-parallel-size 2"),
    "TP 2 + SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP 2": (2, "--pipeline-model-parallel-size 2"),
    "PP 2 x VP 2": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
}
# One step of plain SGD, so large that the weights after it are the gradient.
STEP = "--optimizer sgd --sgd-momentum 0 --lr 1e4 --weight-decay 0 --clip-grad 0".split()
STEP += "--train-iters 1 --save-interval 1 --eval-iters 2 --seed 7".split()
CASES = {
    "bernoulli, untied": [],
    "exact-count, tied, MIRROR": ["--mdm-mask", "exact-count", "--mdm-views", "2"],
}


@pytest.fixture(scope="module", params=CASES)
def runs(request, data, tmp_path_factory):
    """Per layout one run with either head, from the same initial weights."""
    flags = ["--data-path", str(data), "--data-cache-path", str(data.parent / "cache"), *STEP]
    flags += CASES[request.param]

    def run(kind, count, layout):
        directory = tmp_path_factory.mktemp("head")
        save = ["--save", str(directory / "checkpoint"), "--mdm-head", kind]
        result = ranks.launch(directory, count, *flags, *save, *layout.split())
        result.weights = ranks.weights(directory / "checkpoint")
        return result

    with pytest.MonkeyPatch.context() as patch:
        if "untied" not in request.param:
            patch.setattr(ranks, "MODEL", [w for w in ranks.MODEL if not w.startswith("--untie")])
        return {
            name: {kind: run(kind, *layout) for kind in ("masked", "full")}
            for name, layout in LAYOUTS.items()
        }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_those_of_the_full_head(runs, layout):
    masked, full = runs[layout]["masked"], runs[layout]["full"]
    assert masked.losses == pytest.approx(full.losses, rel=1e-6)
    assert masked.grad_norms == pytest.approx(full.grad_norms, rel=1e-6)
    validation = "mdm/validation NELBO"
    assert masked.scalars[validation] == pytest.approx(full.scalars[validation], rel=1e-6)
    assert masked.weights.keys() == full.weights.keys()
    for name, value in full.weights.items():
        difference = (masked.weights[name] - value).norm()
        assert difference <= 1e-6 * value.norm(), name
