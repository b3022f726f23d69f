"""Mixtures of experts: all layouts train alike, and router losses have the right weight."""

from pathlib import Path

import pytest
import torch

from tests import oracle, ranks
from tests.mcore.training.test_normalization import ONE_STEP, RATE, layer_of
from tests.ranks.gathering_attention import context_parallel

EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 16 --num-layers 2".split()
# The load-balancing loss per sequence. Megatron's other kinds depend on the micro-batch size.
LOSSES = "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.5".split()
LOSSES += "--moe-z-loss-coeff 0.02".split()
METHODS = "--mdm-mask exact-count --mdm-views 2 --mdm-normalization rows".split()
SHORT = "--mdm-random-length-fraction 0.7"


@pytest.fixture(scope="module")
def moe(base, tmp_path_factory):
    """Flags that start from a checkpoint with experts: initial weights depend on the layout."""
    directory = tmp_path_factory.mktemp("moe")
    data, save = base[: base.index("--load")], ["--save", str(directory / "checkpoint")]
    few = ["--train-iters", "4", "--save-interval", "4", *save]
    ranks.launch(directory, 1, *data, *EXPERTS, *LOSSES, *few)
    return [*data, *EXPERTS, "--load", str(directory / "checkpoint"), "--finetune"]


LAYOUTS = {
    "micro-batch 4": (1, "--micro-batch-size 4"),
    "TP 2 + SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP 2 x TP 2 + SP": (
        4,
        "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "EP 2, recomputed": (
        2,
        "--expert-model-parallel-size 2 --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1 --overlap-grad-reduce",
    ),
    "EP 2, all-to-all, recomputed": (
        2,
        "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall "
        "--recompute-granularity selective --recompute-modules moe",
    ),
}
# Context parallelism cannot cut rows that end early.
CONTEXT = {"CP 2": (2, "--context-parallel-size 2")}


@pytest.fixture(scope="module")
def runs(moe, tmp_path_factory):
    """One step of plain SGD with all methods at once, so large that it shows the gradient.

    Rows end early, except under context parallelism.
    """

    directory = tmp_path_factory.mktemp("runs")

    def words(name, flags):
        save = ["--save", str(directory / name / "checkpoint"), "--save-interval", "1"]
        return [*moe, *LOSSES, *METHODS, *ONE_STEP, "--train-iters", "1", *save, *flags.split()]

    layouts = {"1 rank": (1, "")} | LAYOUTS
    layouts = {name: (count, f"{flags} {SHORT}") for name, (count, flags) in layouts.items()}
    layouts["1 rank, whole rows"] = 1, ""
    found = ranks.launch_layouts(
        directory, {name: (count, words(name, flags)) for name, (count, flags) in layouts.items()}
    )
    for name, (count, flags) in CONTEXT.items():
        own = words(name, flags)
        found[name] = ranks.launch(directory / name, count, *own, entry=context_parallel)
    for name, run in found.items():
        run.weights = ranks.weights(directory / name / "checkpoint")
    return found


@pytest.mark.parametrize("layout", [*LAYOUTS, *CONTEXT])
def test_layouts_are_equal(runs, layout):
    run = runs[layout]
    reference = runs["1 rank, whole rows" if layout in CONTEXT else "1 rank"]
    assert run.masks() == reference.masks()
    assert run.losses == pytest.approx(reference.losses, rel=1e-5)
    assert run.grad_norms == pytest.approx(reference.grad_norms, rel=1e-5)
    assert run.weights.keys() == reference.weights.keys()
    assert any("router" in name for name in run.weights)
    for name, value in run.weights.items():
        difference = (value - reference.weights[name]).norm()
        assert difference <= 1e-4 * reference.weights[name].norm(), name


def test_hybrid_model_has_the_same_layers(runs, moe, tmp_path):
    pattern = f"--mdm-model hybrid {SHORT} --sequence-parallel".split()
    pattern += "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1".split()
    pattern += "--expert-model-parallel-size 2".split()
    flags = [*moe, *LOSSES, *METHODS, *ONE_STEP, "--train-iters", "1", *pattern]
    run = ranks.launch(tmp_path, 2, *flags)
    assert run.losses == pytest.approx(runs["1 rank"].losses, rel=1e-5)
    assert run.grad_norms == pytest.approx(runs["1 rank"].grad_norms, rel=1e-5)


BLOCKS = "--mdm-mask exact-count --mdm-views 2 --mdm-isolate-documents".split()
BLOCKS += "--optimizer sgd --sgd-momentum 0 --lr 0.1 --weight-decay 0 --train-iters 3".split()
PHASES = ["--mdm-block-size-schedule", "0:4 1:row 2:8"]
BLOCK_LAYOUTS = {
    "EP 2": (2, "--expert-model-parallel-size 2"),
    "EP 2, all-to-all, PP 2": (
        4,
        "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall "
        "--pipeline-model-parallel-size 2",
    ),
    "TP 2 + SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
}


@pytest.fixture(scope="module")
def blocks(moe, tmp_path_factory):
    """Steps of blocks, of whole rows and of blocks again, in rows that end early.

    Under context parallelism all steps have blocks.
    """
    directory = tmp_path_factory.mktemp("blocks")

    def words(name, *flags):
        save = ["--save", str(directory / name / "checkpoint"), "--save-interval", "3"]
        return [*moe, *LOSSES, *BLOCKS, *SHORT.split(), *save, *flags]

    layouts = {"1 rank": (1, "")} | BLOCK_LAYOUTS
    runs = {
        name: (count, words(name, *PHASES, *flags.split()))
        for name, (count, flags) in layouts.items()
    }
    runs["1 rank, blocks only"] = 1, words("1 rank, blocks only", "--mdm-block-size", "4")
    found = ranks.launch_layouts(directory, runs)
    own = words("CP 2", "--mdm-block-size", "4", *CONTEXT["CP 2"][1].split())
    found["CP 2"] = ranks.launch(directory / "CP 2", 2, *own, entry=context_parallel)
    for name, run in found.items():
        run.weights = ranks.weights(directory / name / "checkpoint")
    return found


@pytest.mark.parametrize("layout", [*BLOCK_LAYOUTS, "CP 2"])
def test_layouts_of_blocks_are_equal(blocks, layout):
    run = blocks[layout]
    reference = blocks["1 rank, blocks only" if layout in CONTEXT else "1 rank"]
    assert run.masks() == reference.masks()
    assert len(run.losses) == 3
    assert run.losses == pytest.approx(reference.losses, rel=1e-5)
    assert run.grad_norms == pytest.approx(reference.grad_norms, rel=1e-5)
    assert run.weights.keys() == reference.weights.keys()
    for name, value in run.weights.items():
        difference = (value - reference.weights[name]).norm()
        assert difference <= 1e-5 * reference.weights[name].norm(), name


OBJECTIVES = {
    "tokens": "--no-mdm-eod-eligible",
    "rows": "--mdm-sft --mdm-pad-eligible --mdm-normalization rows --mdm-views 2",
    "documents": "--no-mdm-eod-eligible --mdm-normalization rows --mdm-rate-per document",
    "rows that end early": f"--no-mdm-eod-eligible --mdm-normalization rows {SHORT}",
    "blocks": "--no-mdm-eod-eligible --mdm-block-size 4",
    "blocks of two views": "--no-mdm-eod-eligible --mdm-normalization rows --mdm-block-size 8 "
    f"--mdm-views 2 --mdm-isolate-documents {SHORT}",
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_losses_of_the_routers(name, moe, pairs, tmp_path):
    """Compares gradients with those of J + coefficient x mean, in plain torch on the whole batch.

    Under `tokens`, the sum of the router losses over all positions is also divided by the number of
    eligible tokens. With rates per document, their sum over all rows is divided by the number of
    documents.
    """
    flags = [*moe, *LOSSES, *OBJECTIVES[name].split(), *ONE_STEP]
    flags += ["--data-path", str(pairs)] if name == "rows" else []
    ranks.launch(tmp_path / "plain", 1, *flags, "--micro-batch-size", "8", entry=oracle.whole_batch)
    loss, _, gradients = torch.load(tmp_path / "plain" / "whole_batch.pt")

    save = ["--save", str(tmp_path / "checkpoint"), "--save-interval", "1", "--train-iters", "1"]
    experts = ["--expert-model-parallel-size", "2"]  # DP 2, two micro-batches each
    run = ranks.launch(tmp_path / "run", 2, *flags, *experts, *save)
    assert run.losses[0] == pytest.approx(loss, rel=1e-5)

    before = ranks.weights(Path(moe[moe.index("--load") + 1]))
    after = ranks.weights(tmp_path / "checkpoint")
    for name, gradient in gradients.items():
        key, layer, expert = place_of(name)
        step = (before[key] - after[key]) / RATE
        step = step if layer is None else step[layer]
        step = step if expert is None else step[expert]
        assert (step - gradient).norm() <= 1e-5 * gradient.norm(), name


def place_of(name):
    """(key, layer, expert) of a parameter: checkpoints also stack the experts of a layer."""
    key, layer = layer_of(name)
    before, _, rest = key.partition("local_experts.")
    if not rest:
        return key, layer, None
    expert, _, rest = rest.partition(".")
    return f"{before}experts.{rest}", layer, int(expert)
