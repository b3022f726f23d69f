"""A run of GPTModel goes on as a HybridModel, with the state of its optimizer."""

import pytest

from tests import ranks

TRAIN = "--lr 1e-2 --lr-decay-style linear --adam-eps 1e-2 --save-interval 1 --train-iters 6"
HYBRID = "--mdm-model hybrid"
DISTRIBUTED = "--use-distributed-optimizer --overlap-grad-reduce"
TP = "--tensor-model-parallel-size 2 --sequence-parallel"
VP = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """The parts of three runs of 6 steps: of a GPTModel, and of two that become HybridModels."""
    directory = tmp_path_factory.mktemp("move")
    data, beginning = base[: base.index("--load")], base[base.index("--load") :]

    def first(place, flags):
        return [*data, *TRAIN.split(), "--save", str(directory / place), *beginning, *flags.split()]

    def later(place, flags):
        save = str(directory / place)
        return [*data, *TRAIN.split(), "--save", save, "--load", save, *flags.split()]

    return ranks.launch_layouts(
        directory,
        {
            "whole": (1, first("whole", "")),
            "gpt": (1, first("plain", "--exit-interval 2")),
            "hybrid": (1, later("plain", HYBRID)),
            "dp_reshardable": (2, first("sharded", f"{DISTRIBUTED} {TP} --exit-interval 2")),
            "fully reshardable": (
                2,
                later("sharded", f"{DISTRIBUTED} {TP} {RESHARDABLE} --exit-interval 3"),
            ),
            "hybrid stages": (
                2,
                later("sharded", f"{DISTRIBUTED} {VP} {RESHARDABLE} {HYBRID} --exit-interval 5"),
            ),
            "hybrid ranks": (2, later("sharded", f"{DISTRIBUTED} {RESHARDABLE} {HYBRID}")),
        },
    )


@pytest.mark.parametrize(
    "parts",
    [
        ["gpt", "hybrid"],
        # Megatron reads the optimizer's state of the first part only in the layout that saved it.
        ["dp_reshardable", "fully reshardable", "hybrid stages", "hybrid ranks"],
    ],
)
def test_the_next_steps_are_those_of_gpt_model(parts, runs):
    losses, norms, rates = (
        [x for part in parts for x in runs[part].scalars[name]]
        for name in ("mdm loss", "grad-norm", "learning-rate")
    )
    whole = runs["whole"]
    assert len(losses) == 6 and rates == whole.scalars["learning-rate"]
    assert losses == pytest.approx(whole.losses, rel=1e-5)
    assert norms == pytest.approx(whole.grad_norms, rel=1e-4)
    moves = ["loading a GPT checkpoint into the hybrid" in runs[part].output[0] for part in parts]
    assert moves.count(True) == 1 and moves.index(True) == len(parts) // 2


def test_on_one_rank_no_bit_changes(runs):
    assert runs["gpt"].losses + runs["hybrid"].losses == runs["whole"].losses
