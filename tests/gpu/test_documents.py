"""Documents of packed rows by Transformer Engine, against local layers on the CPU.

That local layers compute the documents alone is shown in tests/mcore/test_normalization.py.
"""

import os

import pytest
import torch

DRY = os.environ.get("MDM_TEST_DEVICE") == "cpu"
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or DRY), reason="attention inside documents needs a GPU"
)
# Losses of many batches under the same weights, which so small a rate leaves as they are.
STILL = "--lr 1e-12 --adam-eps 1 --finetune".split()


@pytest.mark.parametrize(
    "flags",
    [
        "--mdm-isolate-documents",
        "--mdm-isolate-documents --mdm-rate-per document --recompute-activations",
        "--mdm-random-length-fraction 0.5",
        "--mdm-isolate-documents --mdm-random-length-fraction 0.5 --mdm-shift",
    ],
)
def test_losses_of_documents_alone_in_bf16(flags, train, checkpoint):
    """Within twice the error that bfloat16 itself has, on the CPU against float32."""
    load = ["--load", checkpoint, *STILL, *flags.split()]
    reference = train(*load, precision=None, device="cpu")
    baseline = train(*load, device="cpu")
    gpu = train(*load)

    def error(run):
        pairs = zip(run.losses, reference.losses, strict=True)
        return (sum((a - b) ** 2 for a, b in pairs) / len(run.losses)) ** 0.5

    assert error(gpu) < 2 * error(baseline)
