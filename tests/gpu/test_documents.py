"""Documents of packed rows in Transformer Engine, compared with local layers on the CPU.

tests/mcore/training/test_normalization.py shows that local layers compute the documents alone.
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
    """The error is at most twice that of bfloat16 against float32 on the CPU."""
    load = ["--load", checkpoint, *STILL, *flags.split()]
    reference = train(*load, precision=None, device="cpu")
    baseline = train(*load, device="cpu")
    gpu = train(*load)

    allowed = [2 * error for error in errors(baseline, reference)]
    assert all(a < b for a, b in zip(errors(gpu, reference), allowed, strict=True))
