import argparse
import json

import pytest
import torch

from benchmarks import parallel, parallel_figure
from benchmarks.toy_model import Model
from megatron_mdm.errors import UserError
from megatron_mdm.pictures import blank_figure


def run(words):
    parser = argparse.ArgumentParser()
    parallel.add_arguments(parser)
    parallel.run(parser.parse_args(words))


def test_problems_are_different_and_have_their_answers():
    rows = parallel.rows(torch.arange(parallel.PROBLEMS))
    assert rows.shape == (parallel.PROBLEMS, parallel.LENGTH) and parallel.PROMPT % 8 == 0
    assert len(rows[:, : parallel.PROMPT].unique(dim=0)) == parallel.PROBLEMS
    signs = {parallel.PLUS: "+", parallel.MINUS: "-", parallel.EQUALS: "="}
    for row in rows[::997].tolist():
        words = [signs.get(token, str(token)) for token in row]
        assert words[1 : parallel.PROMPT - 1] == [
            word for first in range(8, 20, 4) for word in words[first : first + 2]
        ]
        value = words[0]
        for first in range(parallel.PROMPT, parallel.PROMPT + 12, 4):
            sign, number, equals, result = words[first : first + 4]
            assert equals == "=" and int(result) == eval(f"({value} {sign} {number}) % 10")
            value = result
        assert row[20:] == [parallel.END] * 4


class Oracle:
    """Fills a response from its last tokens to its first, and is surer of END than of the rest."""

    def __init__(self, texts):
        self.texts = texts

    def __call__(self, tokens, positions, seen=None):
        right = torch.nn.functional.one_hot(self.texts[:, : tokens.shape[1]], 257).double()
        sure = torch.where(self.texts[:, : tokens.shape[1]] == parallel.END, 20.0, 6.0)
        return None, right * sure[..., None]


def test_rows_are_counted_by_themselves():
    texts = parallel.rows(torch.arange(5))
    wrong = texts.clone()
    wrong[0, 9] = 3
    for size, expected in ((None, 16 / 13), (8, 16 / 13), (4, 16 / 13), (2, 16 / 14)):
        found = parallel.answers(Oracle(texts), texts, size, 0.9)
        assert found["exact_match"] == 1.0 and found["exact_match_stderr"] == 0.0
        assert found["tokens_per_pass"] == pytest.approx(expected)
        assert parallel.answers(Oracle(texts), texts, size, None)["tokens_per_pass"] == 1.0
        found = parallel.answers(Oracle(wrong), texts, size, 1e-9)
        assert found["exact_match"] == pytest.approx(0.8)
        assert found["tokens_per_pass"] == (size or 16)


def test_training_in_blocks_lowers_the_loss():
    torch.manual_seed(0)
    texts = parallel.rows(torch.arange(0, parallel.PROBLEMS, 7))
    model = Model(parallel.LENGTH)
    assert parallel.train(model, texts, 16, 30) > 2.0 > parallel.train(model, texts, 16, 120)


def test_a_run_and_its_picture(tmp_path, capsys):
    path, picture = tmp_path / "parallel.json", tmp_path / "parallel.png"
    sizes = "--steps 2 --batch 4 --problems 3 --thresholds 0.01 0.99".split()
    run([*sizes, "--json", str(path)])
    document = json.loads(path.read_text())
    found = [(row["block_size"], row["threshold"]) for row in document["rows"]]
    assert found == [(size, p) for size in (2, 4, 8, "row") for p in (0.01, 0.99, None)]
    assert len(capsys.readouterr().out.splitlines()) == 2 + 12
    run(["--report", str(path), "--figure", str(picture)])
    assert picture.stat().st_size > 5000
    with blank_figure() as figure:
        parallel_figure.fill(figure, document["rows"])
        (axes,) = figure.axes
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert names == ["blocks of 2", "blocks of 4", "blocks of 8", "whole rows"]
        assert [text.get_text() for text in axes.texts].count("0.99") == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--report {results}", "--report and --figure need each other"),
        ("--figure {picture}", "--report and --figure need each other"),
        ("--report {results} --figure {picture}", 'not a result file of "benchmark.py parallel'),
        ("--problems 40001", "--problems 40001: must be at most 40000"),
        ("--steps 0", "--steps 0: must be at least 1"),
        ("--thresholds 0.5 1.5", r"--thresholds must lie in \(0, 1\]"),
    ],
)
def test_what_cannot_work_is_refused(words, message, tmp_path):
    (tmp_path / "results.json").write_text('{"rows": [{}]}')
    paths = {"results": tmp_path / "results.json", "picture": tmp_path / "parallel.png"}
    with pytest.raises(UserError, match=message):
        run(words.format(**paths).split())
