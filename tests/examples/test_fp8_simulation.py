"""The study examples/studies/fp8_simulation: rounding, scales, and the errors of all settings."""

import argparse
import json
import sys

import numpy as np
import pytest
import torch

from megatron_mdm.errors import UserError
from tests import ROOT

sys.path.insert(0, str(ROOT / "examples/studies/fp8_simulation"))

import simulate
from simulate import SCALINGS, SETTINGS, Meter, Scale, Scaling, rounded


def numbers(exponent_bits, mantissa_bits, largest):
    """All numbers >= 0 of a format, from the definition of floating point."""
    bias = 2 ** (exponent_bits - 1) - 1
    steps = np.arange(2**mantissa_bits) / 2**mantissa_bits
    normal = [2.0 ** (e - bias) * (1 + steps) for e in range(1, 2**exponent_bits)]
    every = np.concatenate([2.0 ** (1 - bias) * steps, *normal])
    return np.sort(every[every <= largest])


@pytest.mark.parametrize("dtype, bits", [("float8_e4m3fn", (4, 3)), ("float8_e5m2", (5, 2))])
@pytest.mark.parametrize("scale", [1.0, 0.5, 3.7])
def test_rounding_goes_to_the_nearest_number_and_saturates(dtype, bits, scale):
    grid = numbers(*bits, simulate.LARGEST[dtype])
    assert grid[-1] == simulate.LARGEST[dtype]
    generator = torch.Generator().manual_seed(0)
    magnitude = 2.0 ** (24.0 * torch.rand(2000, generator=generator) - 6.0)
    magnitude[:2] = torch.tensor([0.0, 1e9])
    ours = (rounded(magnitude, dtype, scale) * scale).double().numpy()
    scaled = (magnitude * scale).double().numpy()
    nearest = np.abs(grid - scaled[:, None]).min(axis=1)
    assert (np.abs(np.abs(ours - scaled) - nearest) <= 1e-6 * scaled).all()
    assert torch.equal(rounded(-magnitude, dtype, scale), -rounded(magnitude, dtype, scale))


def test_scales_follow_from_what_was_before():
    amax = [2.0, 8.0, 0.0, 1.0, 4.0]
    scales = {
        Scaling(0): [4, 1, 1, 8, 2],  # zeros keep the previous scale
        Scaling(1): [1, 4, 1, 1, 8],
        Scaling(1, margin=2): [1, 1, 0.25, 0.25, 2],
        Scaling(3): [1, 4, 1, 1, 1],
    }
    for scaling, expected in scales.items():
        scale = Scale(scaling, largest=8.0)
        assert [scale(value) for value in amax] == expected


def test_errors_of_products_known_by_hand():
    """Both formats hold 1.75 and its halves, under scales that are powers of two."""
    x, w = torch.tensor([[1.75, 0.0]]), torch.tensor([[1.75, 0.875]])
    g = torch.tensor([[1.75]])
    current, delayed = Meter(Scaling(0)), Meter(Scaling(1))
    for meter in (current, delayed):
        for factor in (1.0, 1.0, 2.0, 1.0):  # the third value is a surprise
            meter.add("layer", x, w, factor * g)
            meter.end_micro_batch()
        meter.end_batch()
    assert current.errors == [0.0] * 4 and current.batch_lengths == [1.0]
    # The first scale is 1, under which these numbers are exact. Later, half of the third is lost.
    assert delayed.errors == [0.0, 0.0, 0.5, 0.0]
    assert delayed.batch_errors == [pytest.approx(1 / 5)]
    assert delayed.batch_lengths == [pytest.approx(4 / 5)]
    summary = delayed.summary([1.0, 1.0, 9.0, 1.0])
    assert summary["weight_gradient_error_heaviest"] == 0.5
    assert summary["saturated"] == 1 / 4 and summary["zeroed"] == 0
    assert summary["input_gradient_error"] == pytest.approx((1 / 7) ** 0.5)


def test_a_constant_factor_on_the_loss_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(6, 6, generator=generator) for _ in range(3))
    errors = []
    for factor in (1.0, 2.0**-20):
        meter = Meter(Scaling(0, "float8_e4m3fn"))
        meter.add("layer", x, w, factor * g)
        meter.end_micro_batch()
        errors += meter.errors
    assert errors[0] == errors[1] > 0


@pytest.mark.slow  # it trains models
def test_every_setting_under_every_scaling(tmp_path):
    path = tmp_path / "fp8.json"
    sizes = {"length": 8, "steps": 2, "batches": 1, "micro_batch": 16}
    simulate.run(argparse.Namespace(json=str(path), **sizes))
    results = json.loads(path.read_text())
    assert results["simulated"] is True
    rows = {(row["setting"], row["scaling"]): row for row in results["rows"]}
    assert set(rows) == {(setting, scaling) for setting in SETTINGS for scaling in SCALINGS}
    for (_, scaling), row in rows.items():
        assert 0 < row["weight_gradient_error"] < 1
        assert row["largest_weight"] >= 1
        assert scaling not in ("current", "current, e4m3") or row["saturated"] == 0
    with pytest.raises(UserError, match="--micro-batch 3: must be even, for MIRROR, and divide"):
        simulate.run(argparse.Namespace(json=None, **{**sizes, "micro_batch": 3}))
