"""The same rows, masks and losses on the GPU as on the CPU; checkpoints go both ways."""

import json
import subprocess
import sys

import pytest

from tests import ranks
from tests.gpu.conftest import DEVICE

# Losses of many batches under the same weights, which so small a rate leaves as they are.
STILL = "--lr 1e-12 --adam-eps 1 --finetune".split()
ROOT = ranks.Path(__file__).parents[2]


@pytest.mark.parametrize(
    "flags",
    [
        "--mdm-recipe standard",
        "--mdm-mask exact-count --mdm-views 2 --mdm-quantiles strata",
        "--mdm-rate-sampler ppots --mdm-ppots-file FILE --mdm-isad-token-ids 5 9",
    ],
)
def test_masks_are_those_of_the_cpu_bit_for_bit(flags, train, checkpoint, tmp_path):
    if "FILE" in flags:
        fit = tmp_path / "fit.json"
        tool = [sys.executable, "tools/fit_ppots.py", "--device", "cpu", "--load", checkpoint]
        tool += "--rates 4 --rows 4 --masks 4 --family piecewise --output".split() + [str(fit)]
        subprocess.run(tool, cwd=ROOT, check=True, capture_output=True)
        flags = flags.replace("FILE", str(fit))
    gpu, cpu = (train(*flags.split(), device=device) for device in (DEVICE, "cpu"))
    assert len(gpu.masks()) > 8
    assert {k: tokens for k, (_, tokens) in gpu.masks().items()} == {
        k: tokens for k, (_, tokens) in cpu.masks().items()
    }
    rates = ([t for t, _ in run.masks().values()] for run in (gpu, cpu))
    assert next(rates) == pytest.approx(next(rates), rel=1e-12)


def test_losses_of_a_cpu_checkpoint_in_float32(train, checkpoint):
    """Local layers, whose products are those of float32: differences are of rounding."""
    load = ["--load", checkpoint, *STILL]
    fused = "--transformer-impl local --no-masked-softmax-fusion --no-rope-fusion".split()
    fused += ["--no-persist-layer-norm", "--attention-backend", "unfused"]
    gpu = train(*load, *fused, precision=None)
    cpu = train(*load, precision=None, device="cpu")
    assert gpu.losses == pytest.approx(cpu.losses, rel=1e-5)


def test_losses_of_a_cpu_checkpoint_in_bf16(train, checkpoint):
    """Within twice the error that bfloat16 itself has, on the CPU against float32."""
    load = ["--load", checkpoint, *STILL]
    reference = train(*load, precision=None, device="cpu")
    baseline = train(*load, device="cpu")
    gpu = train(*load)

    def error(run):
        pairs = zip(run.losses, reference.losses, strict=True)
        return (sum((a - b) ** 2 for a, b in pairs) / len(run.losses)) ** 0.5

    assert 0 < error(baseline) < 0.02 * reference.losses[0]
    assert error(gpu) <= 2 * error(baseline)


@pytest.mark.parametrize("precision", ["bf16", "delayed"])
def test_a_gpu_checkpoint_loads_on_the_cpu(precision, train, tmp_path):
    directory = str(tmp_path / "gpu")
    train("--save", directory, "--save-interval", "1000", precision=precision)
    load = ["--load", directory, *STILL]
    gpu = train(*load, precision="bf16")
    cpu = train(*load, precision="bf16", device="cpu")
    assert gpu.losses == pytest.approx(cpu.losses, rel=5e-3)


def test_the_tools_give_the_cpus_nelbo(checkpoint, data, tmp_path):
    values = []
    for device in (DEVICE, "cpu"):
        path = tmp_path / f"{device}.json"
        tool = [sys.executable, "tools/evaluate.py", "--device", device, "--load", checkpoint]
        tool += ["--data", str(data), "--rows", "8", "--draws", "2", "--json", str(path)]
        subprocess.run(tool, cwd=ROOT, check=True, capture_output=True)
        values.append(json.loads(path.read_text())["nelbo"]["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-4)
