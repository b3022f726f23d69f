import argparse
import json

import pytest

from benchmarks import variance, variance_figure
from megatron_mdm.errors import UserError
from megatron_mdm.pictures import blank_figure
from megatron_mdm.variance.methods import IMPORTANT


@pytest.mark.parametrize("positions", ["learned_absolute", "rope"])
def test_the_table_has_every_method_relative_to_standard(positions, tmp_path):
    path = tmp_path / "variance.json"
    sizes = dict(
        report=None,
        figure=None,
        quick=True,
        length=16,
        batch=8,
        steps=5,
        rows=8,
        positions=positions,
    )
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


def test_results_become_a_picture_with_a_bar_for_each(tmp_path):
    rows = [
        {
            "method": name,
            "gradient_variance_ratio": 0.5,
            "gradient_variance_ratio_stderr": 0.1,
            "unbiased": name != "clipped",
        }
        for name in IMPORTANT
    ]
    with blank_figure() as figure:
        documents = [{"length": 64, "rows": rows}, {"length": 256, "rows": rows[:4]}]
        variance_figure.fill(figure, documents)
        axes = figure.axes[0]
        first, second = axes.containers[1], axes.containers[3]
        assert len(first) == len(variance_figure.LABELS)
        assert len(second) == len(set(IMPORTANT[:4]) & set(variance_figure.LABELS))
        names = [label.get_text() for label in axes.get_yticklabels()]
    assert [name for name in names if name.endswith("*")] == ["recipe clipped *"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--report {results}", "--report and --figure need each other"),
        ("--figure {figure}", "--report and --figure need each other"),
        ("--report {figure} --figure {figure}", "variance.png: is not a result file"),
        ("--report {empty} --figure {figure}", "empty.json: holds no method"),
        (
            "--report {part} --figure {figure}",
            "part.json: is not a result .*gradient_variance_ratio",
        ),
        ("--report {results} --figure {figure}", "results.json: none of the methods has a bar"),
        ("--report {results} --figure x.gif", "--figure x.gif: must end in .png or .svg"),
    ],
)
def test_what_cannot_be_drawn_is_refused(words, message, tmp_path):
    paths = {
        "results": "results.json",
        "empty": "empty.json",
        "part": "part.json",
        "figure": "variance.png",
    }
    paths = {name: str(tmp_path / file) for name, file in paths.items()}
    rows = [dict.fromkeys(variance.DRAWN, 1.0) | {"method": "standard"}]
    (tmp_path / "part.json").write_text(json.dumps({"length": 64, "rows": [{"method": "bell"}]}))
    (tmp_path / "results.json").write_text(json.dumps({"length": 64, "rows": rows}))
    (tmp_path / "empty.json").write_text(json.dumps({"length": 64, "rows": []}))
    parser = argparse.ArgumentParser()
    variance.add_arguments(parser)
    with pytest.raises(UserError, match=message):
        variance.run(parser.parse_args(words.format(**paths).split()))
    assert not (tmp_path / "variance.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--length 0", "--length 0: must be at least 2"),
        ("--rows 1", "needs at least --rows 2"),
        ("--steps -3", "--steps -3: must be at least 1"),
        ("--json {nowhere}", "--json .*nowhere"),
    ],
)
def test_numbers_that_cannot_work_are_refused(words, message, tmp_path):
    (tmp_path / "file").touch()
    nowhere = tmp_path / "file" / "nowhere.json"
    parser = argparse.ArgumentParser()
    variance.add_arguments(parser)
    with pytest.raises(UserError, match=message):
        variance.run(parser.parse_args(words.format(nowhere=nowhere).split()))
