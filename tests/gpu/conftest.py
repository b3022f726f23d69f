"""Tests that need a GPU with Transformer Engine. Elsewhere they are skipped with a reason.

MDM_TEST_DEVICE=cpu runs all of them on the CPU with local layers, without FP8 and with few
iterations. This shows that they run, and nothing about a GPU.
"""

import os
import statistics
from pathlib import Path

import pytest
import torch

from tests import HAS_TRANSFORMER_ENGINE, ranks, tiers
from tests.ranks import launcher

DEVICE = os.environ.get("MDM_TEST_DEVICE", "cuda")
HERE = Path(__file__).parent
# On a GPU, sizes that FP8 products of all recipes and fused attention accept. On the CPU, small
# sizes that run fast.
WIDTH, LENGTH, RATE = (256, 128, 1e-3) if DEVICE == "cuda" else (32, 32, 4e-3)
MODEL = [
    *f"--hidden-size {WIDTH} --ffn-hidden-size {2 * WIDTH} --seq-length {LENGTH}".split(),
    *f"--max-position-embeddings {LENGTH} --micro-batch-size 8 --lr {RATE} --seed 7".split(),
]
# With so small a learning rate, many batches are evaluated at the same weights.
STILL = "--lr 1e-12 --adam-eps 1 --finetune".split()
FP8 = "--bf16 --fp8-format hybrid --fp8-recipe".split()
PRECISIONS = {
    "bf16": ["--bf16"],
    "delayed": [*FP8, *"delayed --fp8-amax-history-len 1024 --fp8-amax-compute-algo max".split()],
    "tensorwise": [*FP8, "tensorwise"],
    "blockwise": [*FP8, "blockwise"],
}


def errors(run, reference):
    """Root mean square differences of two runs: of their losses, and of their gradient norms."""
    pairs = ((run.losses, reference.losses), (run.grad_norms, reference.grad_norms))
    return [
        statistics.mean((a - b) ** 2 for a, b in zip(*pair, strict=True)) ** 0.5 for pair in pairs
    ]


def pytest_collection_modifyitems(items):
    lacks = None
    if DEVICE == "cuda" and not torch.cuda.is_available():
        lacks = "needs a CUDA device (MDM_TEST_DEVICE=cpu for a dry run)"
    elif DEVICE == "cuda" and not HAS_TRANSFORMER_ENGINE:
        lacks = "Transformer Engine is not installed (README.md, Install)"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(tiers.LONG))
            if lacks:
                item.add_marker(pytest.mark.skip(reason=lacks))


@pytest.fixture(scope="package", autouse=True)
def patience():
    """Allows for several runs of 200 iterations that share the GPU and the cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "TIMEOUT", 400)
        yield


@pytest.fixture(scope="package")
def train(data, tmp_path_factory):
    """A function that trains on one rank. A dry run has `dry` iterations."""

    def run(*flags, precision="bf16", device=DEVICE, iterations=20, dry=4, **options):
        layers = PRECISIONS[precision] if precision else []
        if device == "cuda":
            layers = [*layers, "--transformer-impl", "transformer_engine"]
        elif "--bf16" in layers:
            layers = ["--bf16"]
        return ranks.launch(
            tmp_path_factory.mktemp("run"),
            1,
            *MODEL,
            *["--data-path", str(data), "--data-cache-path", str(data.parent / "cache")],
            *["--mdm-device", device, *layers],
            *["--train-iters", str(iterations if DEVICE == "cuda" else dry)],
            *flags,
            transformer_engine=device == "cuda",
            **options,
        )

    return run


@pytest.fixture(scope="package")
def checkpoint(train, tmp_path_factory):
    """A float32 checkpoint from the CPU, after 20 iterations."""
    directory = str(tmp_path_factory.mktemp("checkpoint") / "cpu")
    train("--save", directory, "--save-interval", "20", precision=None, device="cpu", dry=20)
    return directory
