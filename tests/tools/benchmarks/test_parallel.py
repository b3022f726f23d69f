import argparse
import json

import pytest

from benchmarks import parallel, parallel_figure
from megatron_mdm.errors import UserError
from megatron_mdm.pictures import blank_figure
from tests import ranks
from tests.ranks import entries


def run(words):
    parser = argparse.ArgumentParser()
    parallel.add_arguments(parser)
    parallel.run(parser.parse_args(words))


def test_a_run_and_its_picture(base, tmp_path):
    """The second run has the responses of the first at one of its settings as the right ones."""
    problems, path = tmp_path / "problems.jsonl", tmp_path / "parallel.json"
    words = ["--load", base[base.index("--load") + 1], "--device", "cpu", "--json", str(path)]
    words += ["--problems", str(problems), *"--thresholds 0.000001 1 --block-sizes 4 row".split()]
    tool = ["--", "tools/benchmark.py", "parallel", *words]
    settings = [(size, p) for size in (4, "row") for p in (1e-6, 1.0, None)]

    def measure(responses):
        pairs = zip(("1 2 3", "4 5 6 7 8", "9"), responses, strict=True)
        problems.write_text(
            "".join(json.dumps({"prompt": x, "response": y}) + "\n" for x, y in pairs)
        )
        ranks.launch(tmp_path, 1, *tool, entry=entries.tool)
        document = json.loads(path.read_text())
        found = [(row["block_size"], row["threshold"]) for row in document["rows"]]
        assert found == settings and document["problems"] == 3
        return dict(zip(settings, document["rows"], strict=True))

    first = measure(("none", "none", "none"))
    assert {row["exact_match"] for row in first.values()} == {0.0}
    # No prediction is certain. The lowest threshold keeps all predictions of a block.
    for size in (4, "row"):
        assert first[size, 1.0] == first[size, None] | {"threshold": 1.0}
        assert first[size, None]["tokens_per_pass"] <= 1.0
        assert first[size, 1e-6]["tokens_per_pass"] >= first[size, None]["tokens_per_pass"]
    wanted = first[4, None]["example"]
    second = measure((wanted, "none", "none"))
    for setting, row in second.items():
        expected = float(first[setting]["example"] == wanted)
        assert row["exact_match"] == pytest.approx(expected / 3)
        assert row["exact_match_stderr"] == pytest.approx((2 * expected / 27) ** 0.5)

    picture = tmp_path / "parallel.png"
    run(["--report", str(path), "--figure", str(picture)])
    assert picture.stat().st_size > 5000
    with blank_figure() as figure:
        parallel_figure.fill(figure, list(second.values()))
        (axes,) = figure.axes
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert names == ["blocks of 4", "whole rows"]
        assert [text.get_text() for text in axes.texts].count("1") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--report {results}", "--report and --figure need each other"),
        ("--figure {picture}", "--report and --figure need each other"),
        ("--report {results} --figure {picture}", 'not a result file of "benchmark.py parallel'),
        ("--load x", "--load and --problems are needed"),
        ("{both} --rows 0", "--rows 0: must be at least 1"),
        ("{both} --thresholds 0.5 1.5", r"--thresholds must lie in \(0, 1\]"),
        ("{both} --block-sizes four", "--block-sizes four: give a number from 1 on, or row"),
        ("{both}", "results.json: give JSONL with prompt and response"),
        ("--load x --problems {empty}", "is empty"),
    ],
)
def test_what_cannot_work_is_refused(words, message, tmp_path):
    (tmp_path / "results.json").write_text('{"rows": [{}]}')
    (tmp_path / "empty.jsonl").write_text("")
    paths = {"results": tmp_path / "results.json", "picture": tmp_path / "parallel.png"}
    paths["both"] = f"--load x --problems {paths['results']}"
    with pytest.raises(UserError, match=message):
        run(words.format(**paths, empty=tmp_path / "empty.jsonl").split())
