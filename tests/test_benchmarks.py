import argparse
import json

import numpy as np
import pytest
import torch

from megatron_mdm.benchmarks import head, variance
from megatron_mdm.errors import UserError
from megatron_mdm.objective.variance import METHODS, mean, ratio, scatter


def test_variance_is_the_trace_of_the_covariance():
    values = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    trace, stderr = mean(scatter(values))
    assert trace == pytest.approx(np.trace(np.cov(values.numpy().T)))
    # The standard error against that of many repetitions: sum of 7 chi-squared with 49 degrees.
    assert stderr == pytest.approx(np.sqrt(2 * 7 / 49), rel=0.5)


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_error_bars_of_ratios_know_what_the_methods_share(share):
    """Ratios of two variances of 100 batches each, with `share` of the noise in common."""
    rng = np.random.default_rng(0)
    common, own, other = rng.standard_normal((3, 500, 100, 5))
    first, second = (share**0.5 * common + (1 - share) ** 0.5 * x for x in (own, other))
    found = [
        ratio(*(scatter(torch.from_numpy(x)) for x in pair))
        for pair in zip(0.5 * first, second, strict=True)
    ]
    quotients, errors = np.array(found).T
    assert quotients.mean() == pytest.approx(0.25, rel=0.02)
    assert errors.mean() == pytest.approx(quotients.std(ddof=1), rel=0.1)


@pytest.mark.parametrize("positions", ["learned_absolute", "rope"])
def test_the_table_has_every_method_relative_to_standard(positions, tmp_path):
    path = tmp_path / "variance.json"
    sizes = dict(quick=True, length=16, batch=8, steps=5, draws=4, positions=positions)
    variance.run(argparse.Namespace(json=str(path), **sizes))
    rows = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in rows] == list(METHODS)
    assert rows[0]["gradient_variance_ratio"] == 1.0
    for row in rows:
        assert row["gradient_variance_ratio"] > 0
        assert row["per"] in ("row", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["variance.json"]


def test_the_head_at_masked_positions_takes_less_memory(tmp_path):
    path = tmp_path / "head.json"
    sizes = dict(rows=4, length=64, hidden=16, repeats=1, vocabularies=[40_000])
    head.run(argparse.Namespace(json=str(path), **sizes))
    (row,) = json.loads(path.read_text())["vocabularies"]
    assert 0 < row["masked_fraction"] < 0.75
    assert row["time_ratio"] > 0
    if row["peak_ratio"] is not None:
        # Logits of 4 x 64 positions, with their gradient in place.
        assert row["full"]["peak_bytes"] >= 4 * 64 * 40_000 * 4
        assert row["peak_ratio"] < 0.9
    with pytest.raises(UserError, match="--repeats 0: must be at least 1"):
        head.run(argparse.Namespace(json=None, **{**sizes, "repeats": 0}))
