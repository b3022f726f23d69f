import argparse
import json

import pytest

from benchmarks import variance
from megatron_mdm.errors import UserError
from megatron_mdm.variance.methods import IMPORTANT


@pytest.mark.parametrize("positions", ["learned_absolute", "rope"])
def test_the_table_has_every_method_relative_to_standard(positions, tmp_path):
    path = tmp_path / "variance.json"
    sizes = dict(quick=True, length=16, batch=8, steps=5, rows=8, positions=positions)
    methods = ["important"] if positions == "rope" else ["standard", "mirror (texts)"]
    variance.run(argparse.Namespace(json=str(path), methods=methods, **sizes))
    rows = json.loads(path.read_text())["rows"]
    expected = list(IMPORTANT) if positions == "rope" else methods
    assert [row["method"] for row in rows] == expected
    assert rows[0]["gradient_variance_ratio"] == 1.0
    for row in rows:
        assert row["gradient_variance_ratio"] > 0 and row["gradient_variance_ratio_stderr"] >= 0
        assert isinstance(row["loss_variance_ratio"], float)
        assert row["per"] == ("text" if row["method"].endswith("(texts)") else "row")
    assert [p.name for p in tmp_path.iterdir()] == ["variance.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--length 0", "--length 0: must be at least 2"),
        ("--rows 1", "needs at least --rows 2"),
        ("--steps -3", "--steps -3: must be at least 1"),
    ],
)
def test_numbers_that_cannot_work_are_refused(words, message):
    parser = argparse.ArgumentParser()
    variance.add_arguments(parser)
    with pytest.raises(UserError, match=message):
        variance.run(parser.parse_args(words.split()))
