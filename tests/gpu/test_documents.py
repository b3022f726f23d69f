"""Documents of packed rows by Transformer Engine, against local layers on the CPU.

That local layers compute the documents alone is shown in
tests/mcore/training/test_normalization.py.
"""

import os

import pytest
import torch

from tests.gpu.conftest import STILL, errors

DRY = os.environ.get("MDM_TEST_DEVICE") == "cpu"
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or DRY), reason="attention inside documents needs a GPU"
)


@pytest.mark.parametrize(
    "flags",
    [
        "--mdm-isolate-documents",
        "--mdm-isolate-documents --mdm-rate-per document --recompute-activations",
        "--mdm-random-length-fraction 0.5",
        "--mdm-isolate-documents --mdm-random-length-fraction 0.5 --mdm-shift",
    ],
)
def test_losses_and_gradients_of_documents_alone_in_bf16(flags, train, checkpoint):
    """Within twice the error that bfloat16 itself has, on the CPU against float32."""
    load = ["--load", checkpoint, *STILL, *flags.split()]
    reference = train(*load, precision=None, device="cpu")
    baseline = train(*load, device="cpu")
    gpu = train(*load)

    allowed = [2 * error for error in errors(baseline, reference)]
    assert all(a < b for a, b in zip(errors(gpu, reference), allowed, strict=True))
