"""Recomputed activations and overlapped communication change only memory and time."""

import pytest

from tests import ranks

# Everything that they could disturb: two views, the masked head, and the hook on its gradient.
METHODS = "--mdm-views 2 --mdm-mask exact-count --mdm-rate-sampler ppots --mdm-ppots-bins 4"
METHODS += " --mdm-ppots-refit-interval 1 --mdm-ppots-target gradient"
STEPS = "--lr 1e-3 --train-iters 3 --eval-interval 2 --eval-iters 1 --save-interval 3"
FULL = "--recompute-granularity full --recompute-num-layers 1"
RUNS = {
    "full": (1, f"{FULL} --recompute-method uniform"),
    "full, distributed, TP 2": (
        2,
        f"{FULL} --recompute-method block --distribute-saved-activations "
        "--tensor-model-parallel-size 2",
    ),
    "selective, overlapped, DP 2": (
        2,
        "--recompute-granularity selective --recompute-modules core_attn mlp "
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "selective, overlapped, PP 2 x VP 2": (
        2,
        "--recompute-granularity selective --use-distributed-optimizer --overlap-grad-reduce "
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
}


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")

    def words(name, flags):
        save = ["--save", str(directory / name / "checkpoint")]
        return [*base, *METHODS.split(), *STEPS.split(), *flags.split(), *save]

    layouts = {"plain": (1, "")} | RUNS
    found = ranks.launch_layouts(
        directory, {name: (count, words(name, flags)) for name, (count, flags) in layouts.items()}
    )
    for name, run in found.items():
        run.weights = ranks.weights(directory / name / "checkpoint")
    return found


@pytest.mark.parametrize("name", RUNS)
def test_the_plain_run(name, runs):
    saving, plain = runs[name], runs["plain"]
    for tag in ("mdm loss", "grad-norm", "mdm/validation NELBO", "mdm/density at t 0.05"):
        assert saving.scalars[tag] == pytest.approx(plain.scalars[tag], rel=1e-5), tag
    assert saving.weights.keys() == plain.weights.keys()
    for key, value in plain.weights.items():
        if value.is_floating_point():
            assert (saving.weights[key] - value).norm() <= 1e-4 * value.norm(), key
