import argparse
import json

import numpy as np
import pytest
import torch

from megatron_mdm.benchmarks import variance
from megatron_mdm.objective.variance import METHODS
from megatron_mdm.objective.variance import variance as variance_of


def test_variance_is_the_trace_of_the_covariance():
    values = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    trace, stderr = variance_of(values)
    assert trace == pytest.approx(np.trace(np.cov(values.numpy().T)))
    # The standard error against that of many repetitions: sum of 7 chi-squared with 49 degrees.
    assert stderr == pytest.approx(np.sqrt(2 * 7 / 49), rel=0.5)


def test_the_table_has_every_method_relative_to_standard(tmp_path):
    path = tmp_path / "variance.json"
    variance.run(argparse.Namespace(json=str(path), quick=True, length=16, steps=5, draws=4))
    rows = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in rows] == list(METHODS)
    assert rows[0]["gradient_variance_ratio"] == 1.0
    for row in rows:
        assert row["gradient_variance_ratio"] > 0
        assert row["per"] in ("row", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["variance.json"]
