"""Rows, masks, losses and gradients on the GPU equal those on the CPU; checkpoints go both ways."""

import json

import pytest

from tests import ranks
from tests.gpu.conftest import DEVICE, STILL, errors


@pytest.mark.parametrize(
    "flags",
    [
        "--mdm-recipe standard",
        "--mdm-recipe recommended",
        "--mdm-mask exact-count --mdm-views 2 --mdm-quantiles strata",
        "--mdm-rate-sampler ppots --mdm-ppots-file FILE --mdm-isad-token-ids 5 9",
    ],
)
def test_masks_are_those_of_the_cpu_bit_for_bit(flags, train, checkpoint, tmp_path):
    if "FILE" in flags:
        fit = tmp_path / "fit.json"
        few = "--rates 4 --rows 4 --masks 4 --family piecewise".split()
        ranks.fit_ppots(checkpoint, fit, *few)
        flags = flags.replace("FILE", str(fit))
    gpu, cpu = (train(*flags.split(), device=device) for device in (DEVICE, "cpu"))
    assert len(gpu.masks()) > 8
    assert {k: tokens for k, (_, tokens) in gpu.masks().items()} == {
        k: tokens for k, (_, tokens) in cpu.masks().items()
    }
    rates = ([t for t, _ in run.masks().values()] for run in (gpu, cpu))
    assert next(rates) == pytest.approx(next(rates), rel=1e-12)


def test_losses_and_gradients_of_a_cpu_checkpoint_in_float32(train, checkpoint):
    """Local layers compute float32 products, so differences come from rounding alone."""
    load = ["--load", checkpoint, *STILL]
    fused = "--transformer-impl local --no-masked-softmax-fusion --no-rope-fusion".split()
    fused += ["--no-persist-layer-norm", "--attention-backend", "unfused"]
    gpu = train(*load, *fused, precision=None)
    cpu = train(*load, precision=None, device="cpu")
    assert gpu.losses == pytest.approx(cpu.losses, rel=1e-5)
    assert gpu.grad_norms == pytest.approx(cpu.grad_norms, rel=1e-4)


def test_losses_and_gradients_of_a_cpu_checkpoint_in_bf16(train, checkpoint):
    """The error is at most twice that of bfloat16 against float32 on the CPU."""
    load = ["--load", checkpoint, *STILL]
    reference = train(*load, precision=None, device="cpu")
    baseline = errors(train(*load, device="cpu"), reference)
    gpu = errors(train(*load), reference)
    sizes = (reference.losses[0], reference.grad_norms[0])
    for own, allowed, size in zip(gpu, baseline, sizes, strict=True):
        assert 0 < allowed < 0.02 * size
        assert own <= 2 * allowed


@pytest.mark.parametrize("precision", ["bf16", "delayed"])
def test_a_gpu_checkpoint_loads_on_the_cpu(precision, train, data, tmp_path):
    """This includes checkpoints with FP8's delayed scales, loaded into models without scales."""
    directory = str(tmp_path / "gpu")
    train("--save", directory, "--save-interval", "1000", precision=precision)
    load = ["--load", directory, *STILL]
    gpu = train(*load, precision="bf16")
    cpu = train(*load, precision="bf16", device="cpu")
    assert gpu.losses == pytest.approx(cpu.losses, rel=5e-3)
    assert gpu.grad_norms == pytest.approx(cpu.grad_norms, rel=5e-2)
    values = [nelbo(directory, data, device, tmp_path) for device in (DEVICE, "cpu")]
    assert values[0] == pytest.approx(values[1], rel=5e-3)
    # Five tokens are not a number of rows that FP8 products take, so the tool must not use FP8.
    few = ["--prompt", "5 6", "--length", "5"]
    ranks.run_tool("generate", "--device", DEVICE, "--load", directory, *few)


def test_the_tools_give_the_cpus_nelbo(checkpoint, data, tmp_path):
    values = [nelbo(checkpoint, data, device, tmp_path) for device in (DEVICE, "cpu")]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def nelbo(checkpoint, data, device, directory):
    """The NELBO that tools/evaluate.py finds for some rows."""
    path = directory / f"{device}.json"
    flags = ["--data", str(data), "--rows", "8", "--draws", "2", "--json", str(path)]
    ranks.run_tool("evaluate", "--device", device, "--load", checkpoint, *flags)
    return json.loads(path.read_text())["nelbo"]["value"]
