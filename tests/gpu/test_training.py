"""Training on a GPU: FP8 against BF16, resuming, evaluations, and all methods at once."""

import math
import statistics

import pytest
import torch

from megatron_mdm.mcore.data.batch import side_by_side
from tests.gpu.conftest import DEVICE, LENGTH, PRECISIONS

FP8 = [name for name in PRECISIONS if name != "bf16"]
EVERYTHING = [
    *"--mdm-rate-sampler ppots --mdm-ppots-refit-interval 2 --mdm-ppots-target gradient".split(),
    *"--mdm-ppots-bins 4 --mdm-views 2 --mdm-mask exact-count --mdm-head masked".split(),
]


@pytest.fixture(scope="module")
def bf16(train):
    return train(iterations=200, dry=200)


def test_something_is_learnt(bf16):
    """The means are over many steps, because batches of 8 rows differ in rates and so in losses."""
    assert statistics.mean(bf16.losses[-40:]) < 0.95 * statistics.mean(bf16.losses[:40])


@pytest.mark.parametrize("precision", FP8)
def test_loss_curves_are_within_a_percent_of_bf16(precision, train, bf16):
    fp8 = train(precision=precision, iterations=200, dry=200)
    assert fp8.masks() == bf16.masks()
    windows = range(0, len(bf16.losses), 20)
    for i in windows:
        expected = statistics.mean(bf16.losses[i : i + 20])
        assert statistics.mean(fp8.losses[i : i + 20]) == pytest.approx(expected, rel=0.01)
    if DEVICE == "cuda":
        assert fp8.losses != bf16.losses, "FP8 was not used"


@pytest.mark.parametrize("precision", ["bf16", "delayed"])
def test_a_resumed_run_goes_on(precision, train, tmp_path, monkeypatch):
    save = ["--save", str(tmp_path / "checkpoint"), "--save-interval", "2"]
    # Transformer Engine keeps delayed scales in a pickle, which it reads only with this consent.
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    train(*save, "--exit-interval", "10" if DEVICE == "cuda" else "2", precision=precision)
    resumed = train(*save, "--load", save[1], precision=precision)
    whole = train(precision=precision)
    count = len(resumed.losses)
    assert 0 < count < len(whole.losses)
    tail = {key: value for key, value in whole.masks().items() if key in resumed.masks()}
    assert resumed.masks() == tail
    assert resumed.losses == pytest.approx(whole.losses[-count:], rel=2e-3)


def test_evaluations_do_not_move_the_scales_of_training(train, monkeypatch):
    """Only deterministic kernels are allowed; two equal runs show the noise that remains."""
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    evaluate = "--eval-interval 2 --eval-iters 2 --eval-global-batch-size 8".split()
    first, second = (train(precision="delayed").losses for _ in range(2))
    evaluated = train(*evaluate, precision="delayed")
    assert len(evaluated.scalars["mdm/validation NELBO"]) > 1
    noise = max(abs(a - b) for a, b in zip(first, second, strict=True))
    gaps = (abs(a - b) for a, b in zip(first, evaluated.losses, strict=True))
    assert max(gaps) <= max(10 * noise, 1e-5 * first[0])


def test_gradients_may_be_accumulated_by_the_products_or_after_them(train):
    """In float32, or after rounding to bfloat16, with four micro-batches per step."""
    four = "--micro-batch-size 2 --global-batch-size 8 --lr 1e-12 --adam-eps 1".split()
    inside, after = (train(*four, *x) for x in ([], ["--no-gradient-accumulation-fusion"]))
    assert inside.losses == pytest.approx(after.losses, rel=1e-5)
    assert inside.grad_norms == pytest.approx(after.grad_norms, rel=1e-2)
    if DEVICE == "cuda":
        assert inside.grad_norms != after.grad_norms, "nothing was accumulated inside"


@pytest.mark.skipif(DEVICE != "cuda", reason="memory is pinned for a GPU")
def test_rows_stay_pinned_for_the_copy_to_the_device():
    parts = [torch.ones(2, n, dtype=torch.int64).pin_memory() for n in (1, 3)]
    assert side_by_side(parts).is_pinned()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_everything_at_once(precision, train):
    run = train(*EVERYTHING, precision=precision, iterations=60, dry=6)
    assert all(math.isfinite(loss) for loss in run.losses)
    assert "P-POTS refit at iteration" in run.output[0]
    weights = run.scalars["mdm/largest weight"]
    # A row masks at least one token, and a tenth of the density is uniform.
    assert all(1.0 <= weight <= LENGTH / 0.1 for weight in weights)
    assert max(weights) > 1.0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_masked_head_gives_the_full_heads_loss(precision, train):
    masked, full = (train("--mdm-head", head, precision=precision) for head in ("masked", "full"))
    assert masked.masks() == full.masks()
    assert masked.losses[0] == pytest.approx(full.losses[0], rel=1e-3)
    assert masked.losses == pytest.approx(full.losses, rel=1e-2)
