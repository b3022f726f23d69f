"""One run under every layout: equal rows, masks, losses, gradients and weights.

It takes about a minute, and tests the plugin's central claim.
"""

import pytest
import torch

from tests import ranks

# Plain SGD at a constant rate: after 5 steps, the weights show the sum of the gradients.
SGD = ["--optimizer", "sgd", "--sgd-momentum", "0", "--lr", "0.1", "--weight-decay", "0"]
LAYOUTS = {
    "micro-batch 1": (1, "--micro-batch-size 1"),
    "micro-batch 4": (1, "--micro-batch-size 4"),
    "DP 2": (2, ""),
    "TP 2": (2, "--tensor-model-parallel-size 2"),
    "TP 2 + SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP 2": (2, "--pipeline-model-parallel-size 2"),
    "PP 2 x VP 2": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "TP 2 x PP 2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "HybridModel": (1, "--mdm-model hybrid"),
    "HybridModel, TP 2 + SP": (
        2,
        "--mdm-model hybrid --tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "HybridModel, PP 2 x VP 2": (
        2,
        "--mdm-model hybrid --pipeline-model-parallel-size 2 "
        "--num-layers-per-virtual-pipeline-stage 1",
    ),
}
# Splitting sums differently changes rounding; these layouts add in the same order.
BITWISE_LOSS = {"PP 2", "PP 2 x VP 2", "HybridModel", "HybridModel, PP 2 x VP 2"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base):
    directory = tmp_path_factory.mktemp("runs")

    def words(name, flags):
        save = ["--save", str(directory / name / "checkpoint"), "--save-interval", "5"]
        return [*base, *SGD, *save, *flags.split()]

    layouts = {"1 rank": (1, "")} | LAYOUTS
    found = ranks.launch_layouts(
        directory, {name: (count, words(name, flags)) for name, (count, flags) in layouts.items()}
    )
    for name, run in found.items():
        run.weights = ranks.weights(directory / name / "checkpoint")
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_are_bitwise_equal(runs, layout):
    masks = runs[layout].masks()
    assert masks == runs["1 rank"].masks()
    assert len(masks) == 40


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradient_norms_are_equal(runs, layout):
    run, reference = runs[layout], runs["1 rank"]
    assert len(run.losses) == 5
    if layout in BITWISE_LOSS:
        assert run.losses == reference.losses
    assert run.losses == pytest.approx(reference.losses, rel=1e-5)
    assert run.grad_norms == pytest.approx(reference.grad_norms, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_equal(runs, layout):
    """Compares the weights after SGD tensor by tensor: every gradient, not only their norm."""
    weights, reference = runs[layout].weights, runs["1 rank"].weights
    assert weights.keys() == reference.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, reference[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("layout", ["DP 2", "TP 2", "TP 2 x PP 2"])
def test_rows_differ_between_data_parallel_ranks_only(runs, layout):
    rows = [{row for _, row in trace} for trace in runs[layout].traces]
    if layout == "DP 2":
        assert not rows[0] & rows[1]
    else:
        assert all(r == rows[0] for r in rows)


@pytest.fixture(scope="module")
def adam(tmp_path_factory, base):
    flags = [*base, "--lr", "1e-3"]
    runs = {"1 rank": (1, flags), "DP 2": (2, flags)}
    runs["distributed"] = (2, [*flags, "--use-distributed-optimizer"])
    hybrid = [*flags, "--mdm-model", "hybrid"]
    runs["HybridModel"] = (1, hybrid)
    runs["HybridModel, distributed"] = (2, [*hybrid, "--use-distributed-optimizer"])
    return ranks.launch_layouts(tmp_path_factory.mktemp("adam"), runs)


def test_the_distributed_optimizer_changes_nothing(adam):
    """All runs begin Adam's averages anew, also a HybridModel that starts from a GPTModel's."""
    reference = adam["1 rank"]
    for run in adam.values():
        assert run.losses == pytest.approx(reference.losses, rel=1e-5)
        assert run.grad_norms == pytest.approx(reference.grad_norms, rel=1e-5)
        assert run.masks() == reference.masks()


def test_tied_embeddings_under_virtual_stages(base, tmp_path):
    """Ranks exchange tied embeddings while they build their stages; this once was a deadlock."""
    tied = {"drop": ["--untie-embeddings-and-output-weights"]}
    flags = base[: base.index("--load")]
    save = ["--save", str(tmp_path / "checkpoint"), "--save-interval", "2"]
    whole = ranks.launch(tmp_path / "whole", 1, *flags, *save, **tied)
    stages = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1".split()
    load = ["--load", save[1], "--ckpt-step", "2"]
    run = ranks.launch(tmp_path / "stages", 2, *flags, *load, *stages, **tied)
    assert len(run.losses) == 3 and run.losses == pytest.approx(whole.losses[2:], rel=1e-5)
