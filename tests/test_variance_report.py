"""The report over a small torch model: two routes to one variance, and what happens on Ctrl-C."""

import json
import math

import pytest
import torch

from megatron_mdm.errors import UserError
from megatron_mdm.objective.loss import row_losses
from megatron_mdm.objective.variance import METHODS, Sketch
from megatron_mdm.variance_report import Settings, State, as_text, draw_figure, measure

VOCABULARY, MASK, LENGTH = 12, 11, 8


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(VOCABULARY, 8)
    head = torch.nn.Linear(8, VOCABULARY)
    parameters = Sketch([*embedding.parameters(), *head.parameters()], None)

    def step(tokens, eligible, corruption):
        hidden = embedding(corruption.tokens)
        logits = head(hidden + hidden.mean(dim=1, keepdim=True))
        cross_entropy = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), tokens, reduction="none"
        )
        losses = row_losses(
            cross_entropy, corruption.mask, corruption.weight, eligible.sum(dim=1), "rows"
        )
        loss = losses.numerator / len(tokens)
        return float(loss), parameters.gradient(loss)

    return step


@pytest.fixture(scope="module")
def texts():
    rows = torch.randint(0, MASK, (400, LENGTH), generator=torch.Generator().manual_seed(1))
    return rows, torch.ones_like(rows, dtype=torch.bool)


@pytest.fixture(scope="module")
def causal():
    """Next-token losses that the tests can compute on their own: each token by itself."""
    torch.manual_seed(0)
    logits = torch.nn.Parameter(torch.randn(VOCABULARY))
    parameters = Sketch([logits], None)

    def step(tokens, eligible):
        assert eligible.all()
        loss = -logits.log_softmax(dim=0)[tokens[:, 1:]].mean()
        return float(loss), parameters.gradient(loss)

    return step


def settings(**changes):
    values = {"rows": 300, "rates": 3, "masks": 2, "batches": 300, "batch": 4, "bins": 4}
    values |= {"mask_token_id": MASK, "eps": 0.1, "seed": 0, "subject": "toy"}
    return Settings(**(values | changes))


@pytest.fixture(scope="module")
def report(model, causal, texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.partial"
    return measure(model, *texts, settings(), State(str(path), settings()), causal=causal)


def test_nested_draws_and_whole_batches_agree_on_the_variance(report):
    """A + B + C of one row over the batch size is the variance of a batch of independent rows."""
    for name in ("loss", "gradient"):
        value, error = report["standard batch"][name]
        total, total_error = report[name]["total"]
        assert abs(4 * value - total) < 4 * math.hypot(4 * error, total_error)
        assert error < 0.2 * value and total_error < 0.2 * total
        parts = sum(report[name][part][0] for part in "ABC")
        assert parts == pytest.approx(total)


def test_an_autoregressive_model_has_data_noise_only(report, causal, texts):
    """The tokens are independent and uniform, so the variance of their mean is known."""
    losses, gradients = zip(*(causal(row[None], row[None] >= 0) for row in texts[0]), strict=True)
    for name, values in (("loss", torch.tensor(losses)[:, None]), ("gradient", gradients)):
        value, error = report["autoregressive"][name]["C"]
        # The report has 300 of these rows; a trace is a sum over columns.
        rows = torch.stack(list(values))[:300].double()
        assert value == pytest.approx(float(rows.var(dim=0).sum()), rel=1e-5)
        assert 0 < error < 0.2 * value
    # softmax - one-hot over the 7 tokens: the trace of the covariance of one token's one-hot.
    expected = (1 - 1 / MASK) / (LENGTH - 1)
    value, error = report["autoregressive"]["gradient"]["C"]
    assert abs(value - expected) < 4 * error
    assert "C     autoregressive" in as_text(report)


def test_the_report_has_every_method_its_cost_and_its_figure(report, tmp_path):
    rows = {row["method"]: row for row in report["methods"]}
    assert list(rows) == list(METHODS)
    assert rows["standard"]["gradient"] == (1.0, 0.0)
    assert rows["exact count"]["loss"][0] < 0.9
    assert (rows["mirror"]["rows"], rows["mirror"]["texts"]) == (4, 2)
    assert (rows["mirror (texts)"]["rows"], rows["mirror (texts)"]["texts"]) == (8, 4)
    assert rows["standard"]["masked_fraction"] == pytest.approx(0.55, abs=0.05)  # mean of p(t)
    assert "mirror (texts)" in as_text(report)
    json.dumps(report)
    for name in ("figure.png", "figure.svg"):
        draw_figure(report, str(tmp_path / name))
        assert (tmp_path / name).stat().st_size > 5000
    assert "<svg" in (tmp_path / "figure.svg").read_text()


def test_an_interrupted_measurement_goes_on_where_it_was(model, causal, texts, tmp_path):
    few = settings(rows=6, batches=3)
    whole = measure(model, *texts, few, State(str(tmp_path / "whole"), few), causal=causal)
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) in (20, 60):
            raise KeyboardInterrupt
        return model(*args)

    path = str(tmp_path / "partial")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            measure(interrupted, *texts, few, State(path, few), causal=causal)
    assert measure(interrupted, *texts, few, State(path, few), causal=causal) == whole
    # 20th call: row 3 anew; 60th: one method anew.
    assert len(calls) < 6 * 3 * 2 + 11 * 3 + 6 + 3 + 1
    with pytest.raises(UserError, match="other settings"):
        State(path, settings(rows=7, batches=3))
    (tmp_path / "partial").write_bytes(b"no archive")
    with pytest.raises(UserError, match="damaged"):
        State(path, few)


def test_bad_settings_are_one_line(model, texts, tmp_path):
    for changes in ({"rates": 2}, {"masks": 1}, {"rows": 1}):
        with pytest.raises(UserError, match="--rows 2, --rates 3"):
            settings(**changes)
    for changes in ({"batch": 3}, {"batches": 1}):
        with pytest.raises(UserError, match="--batches"):
            settings(**changes)
    many = settings(rows=401)
    with pytest.raises(UserError, match="400 whole rows and --rows asks for 401"):
        measure(model, *texts, many, State(str(tmp_path / "state"), many))
    assert not list(tmp_path.iterdir())
