"""Rows with blocks in Transformer Engine's fused attention, compared with local layers on the CPU.

tests/mcore/training/test_blocks.py shows that local layers compute the definition.
"""

import shlex

import pytest

from tests.gpu.conftest import DEVICE, STILL, errors


@pytest.mark.parametrize(
    "flags",
    [
        "--mdm-block-size 8",
        "--mdm-block-size 8 --mdm-isolate-documents --recompute-activations",
        "--mdm-block-size 4 --mdm-views 2 --mdm-shift --mdm-isolate-documents",
        "--mdm-block-size-schedule '0:16 2:row' --mdm-isolate-documents --mdm-model hybrid",
    ],
)
def test_losses_and_gradients_of_blocks_in_bf16(flags, train, checkpoint):
    """The error is at most twice that of bfloat16 against float32 on the CPU.

    The run would stop if the fused kernel did not take these rows.
    """
    load = ["--load", checkpoint, *STILL, *shlex.split(flags)]
    reference = train(*load, precision=None, device="cpu")
    baseline = train(*load, device="cpu")
    gpu = train(*load)
    if DEVICE == "cuda":
        assert "blocks with Transformer Engine: --attention-backend fused" in gpu.output[0]

    allowed = [2 * error for error in errors(baseline, reference)]
    assert all(a < b for a, b in zip(errors(gpu, reference), allowed, strict=True))


def test_the_fused_kernel_gives_the_loss_of_the_unfused_attention(train, checkpoint):
    """Both on the same device, in the same precision, with FP8 in neither."""
    load = ["--load", checkpoint, *STILL, "--mdm-block-size", "8"]
    fused = train(*load)
    unfused = train(*load, *["--attention-backend", "unfused"] * (DEVICE == "cuda"))
    assert fused.losses == pytest.approx(unfused.losses, rel=1e-3)
    assert fused.grad_norms == pytest.approx(unfused.grad_norms, rel=2e-2)
