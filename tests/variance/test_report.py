"""The report of a small torch model: two ways to the same variance, and interruption by Ctrl-C."""

import dataclasses
import json
import math
import zipfile

import numpy as np
import pytest
import torch

from megatron_mdm.errors import UserError
from megatron_mdm.evaluation.nelbo import ScoredRow
from megatron_mdm.objective.loss import row_losses
from megatron_mdm.pictures import blank_figure
from megatron_mdm.variance.figure import as_text, draw_figure, fill
from megatron_mdm.variance.methods import IMPORTANT, METHODS, batches, choose
from megatron_mdm.variance.report import Settings, densities, entropy, measure, report
from megatron_mdm.variance.sketch import Sketch
from megatron_mdm.variance.state import State
from tests import shown

VOCABULARY, MASK, LENGTH, EPS, BATCH, ROWS = 12, 11, 8, 0.1, 4, 200


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(VOCABULARY, 8)
    head = torch.nn.Linear(8, VOCABULARY)
    return embedding, head, Sketch([*embedding.parameters(), *head.parameters()], None)


def loss_of(model, tokens, eligible, corruption):
    """The mean loss of masked rows, and their final hidden states."""
    embedding, head, _ = model
    hidden = embedding(corruption.tokens)
    hidden = hidden + hidden.mean(dim=1, keepdim=True)
    cross_entropy = torch.nn.functional.cross_entropy(
        head(hidden).transpose(1, 2), tokens, reduction="none"
    )
    losses = row_losses(
        cross_entropy, corruption.mask, corruption.weight, eligible.sum(dim=1), "rows"
    )
    return losses.numerator / len(tokens), hidden


@pytest.fixture(scope="module")
def step(model):
    def step(text, corruption):
        tokens, eligible = (x.expand_as(corruption.mask) for x in (text.tokens, text.eligible))
        loss, hidden = loss_of(model, tokens, eligible, corruption)
        return float(loss.detach()), *model[2].gradient_and_norm(loss, hidden)

    return step


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(1)
    # Tokens follow Zipf's law, so that there is data noise.
    rows = torch.multinomial(
        1 / torch.arange(1.0, MASK + 1), 400 * LENGTH, True, generator=generator
    )
    everywhere = torch.ones(LENGTH, dtype=torch.bool)
    return [ScoredRow(row, everywhere) for row in rows.view(400, LENGTH)]


@pytest.fixture(scope="module")
def causal():
    """Next-token losses that tests can compute themselves: the logits depend on no other token."""
    torch.manual_seed(0)
    logits = torch.nn.Parameter(torch.randn(VOCABULARY))
    parameters = Sketch([logits], None)

    def step(text):
        assert text.eligible.all()
        loss = -logits.log_softmax(dim=0)[text.tokens[1:]].mean()
        return float(loss.detach()), parameters.gradient(loss)

    return step


def settings(**changes):
    values = {"rows": ROWS, "rates": 3, "masks": 2, "batch": BATCH, "bins": 4, "methods": IMPORTANT}
    values |= {"mask_token_id": MASK, "eps": EPS, "seed": 0, "isad_token_ids": (0, 1)}
    return Settings(**(values | changes))


@pytest.fixture(scope="module")
def measured(step, causal, texts):
    state = State(settings())
    measure(step, texts, settings(), state, causal=causal)
    return state, report(state, settings(), texts)


def batch_variances(model, texts, name, sampler, draws=2000):
    """The variance of whole batches drawn as in training, with its error: loss, then gradient."""
    rows = torch.stack([text.tokens for text in texts])
    eligible = torch.stack([text.eligible for text in texts])
    source = batches(rows, eligible, METHODS[name], sampler, MASK, EPS, BATCH, seed=1)
    found = []
    for _ in range(draws):
        loss, _ = loss_of(model, *next(source))
        found.append(torch.cat([loss.detach()[None], model[2].gradient(loss)]))
    values = torch.stack(found).double().numpy()
    squares = (values - values.mean(axis=0)) ** 2
    for part in (squares[:, 0], squares[:, 1:].sum(axis=1)):
        yield part.mean(), part.std() / math.sqrt(draws)


@pytest.mark.slow  # many repetitions
def test_nested_draws_and_whole_batches_agree_on_the_variance_of_every_method(
    model, texts, measured
):
    state, found = measured
    samplers = densities(state, settings(), LENGTH)
    rows = {row["method"]: row for row in found["methods"]}
    names = ("standard", "strata", "exact-count+mirror (texts)", "4-views")
    for name in (*names, "ppots-gradient+lattice+exact-count"):
        drawn = batch_variances(model, texts, name, METHODS[name].sampler(samplers))
        for what, (value, error) in zip(("loss", "gradient"), drawn, strict=True):
            ratio, ratio_error = rows[name][what]
            standard, standard_error = found["standard batch"][what]
            expected = ratio * standard
            spread = math.hypot(error, ratio_error * standard, ratio * standard_error)
            assert abs(value - expected) < 4 * spread, (name, what)
            assert spread < 0.2 * expected, (name, what)
    for what in ("loss", "gradient"):
        total = found[what]["total"][0]
        assert BATCH * found["standard batch"][what][0] == pytest.approx(total, rel=0.05)
        assert sum(found[what][part][0] for part in "ABC") == pytest.approx(total)


def test_what_changes_the_objective_or_the_log_alone_says_so(measured):
    _, found = measured
    rows = {row["method"]: row for row in found["methods"]}
    biased = [name for name, row in rows.items() if not row["unbiased"]]
    assert biased == ["isad", "clipped", "flat", "bell", "bell+lattice+exact-count"]
    assert rows["ema"]["gradient"] == rows["standard"]["gradient"] == (1.0, 0.0)
    # The control variate removes the part of the loss that the rate explains.
    expected = 1 - found["loss"]["B"][0] / found["loss"]["total"][0]
    assert rows["ema"]["loss"][0] == pytest.approx(expected, abs=0.1)
    assert rows["isad"]["masked_fraction"] > rows["standard"]["masked_fraction"]
    text = as_text(found)
    assert found["documents"] == ROWS and "documents" not in text
    assert f"the {ROWS} rows are from 3 documents. The" in as_text({**found, "documents": 3})
    assert "clipped *" in text and "bell *" in text and "proposal *" not in text
    assert "* another objective" in text


def test_densities_are_fitted_with_the_weights_of_the_draws(measured):
    """Compares with weighted moments: rates that are drawn more often must not count more."""
    state, _ = measured
    t = state.column("t")
    assert (t < 0.2).mean() > 0.3  # many small rates were drawn
    q = densities(state, settings(), LENGTH)["loss", "bernoulli"]
    x = (torch.arange(4, dtype=torch.float64) + 0.5) / 4
    squares = state.column("bernoulli x 1: loss") ** 2
    weight = np.repeat(state.column("weight"), 2).reshape(squares.shape)
    index = np.repeat(np.ceil(t * 4) - 1, 2).reshape(squares.shape)
    root = [
        math.sqrt(np.average(squares[index == i], weights=weight[index == i])) for i in range(4)
    ]
    expected = 0.9 * np.array(root) / np.mean(root) + 0.1
    assert q.density(x).numpy() == pytest.approx(expected, rel=0.15)


def test_an_autoregressive_model_has_data_noise_only(measured, causal, texts):
    _, found = measured
    losses, gradients = zip(*(causal(text) for text in texts[:ROWS]), strict=True)
    for name, values in (("loss", torch.tensor(losses)[:, None]), ("gradient", gradients)):
        value, error = found["autoregressive"][name]["C"]
        rows = torch.stack(list(values)).double()  # the trace is a sum over columns
        assert value == pytest.approx(float(rows.var(dim=0).sum()), rel=1e-5)
        assert 0 < error < 0.2 * value
    mean, error = found["autoregressive"]["mean loss"]
    assert mean == pytest.approx(np.mean(losses))
    assert error == pytest.approx(np.std(losses) / math.sqrt(ROWS), rel=0.1)


def test_a_network_that_predicts_no_next_tokens_is_told_from_one_that_does(measured):
    _, found = measured
    frequencies = 1 / np.arange(1.0, MASK + 1)
    p = frequencies / frequencies.sum()
    known = found["autoregressive"]["unigram entropy"]
    assert known == pytest.approx(-(p * np.log(p)).sum(), rel=0.03)
    assert entropy(torch.tensor([3, 3, 5, 5])) == pytest.approx(math.log(2))
    assert found["autoregressive"]["mean loss"][0] > known
    text = as_text(found)
    assert "C     autoregressive" in text and "WARNING: this network does not predict" in text
    trained = {**found["autoregressive"], "mean loss": (known - 0.1, 0.01)}
    text = as_text({**found, "autoregressive": trained})
    assert "C     autoregressive" in text and "WARNING" not in text


def test_the_report_has_every_method_its_cost_and_its_figure(measured, tmp_path):
    _, found = measured
    rows = {row["method"]: row for row in found["methods"]}
    assert list(rows) == list(IMPORTANT)
    assert (rows["mirror"]["rows"], rows["mirror"]["texts"]) == (4, 2)
    assert (rows["mirror (texts)"]["rows"], rows["mirror (texts)"]["texts"]) == (8, 4)
    assert (rows["4-views"]["rows"], rows["4-views"]["texts"]) == (4, 1)
    assert rows["standard"]["masked_fraction"] == pytest.approx(0.55, abs=0.02)  # mean of p(t)
    tokens = rows["standard"]["masked_fraction"] * 4 * LENGTH
    assert rows["standard"]["head_tokens"] == pytest.approx(tokens)
    assert "mirror (texts)" in as_text(found)
    json.dumps(found)
    with blank_figure() as figure:
        fill(figure, found)
        shown.check_panels(figure)
        shares, curves, methods = figure.axes
        # From top to bottom, methods stand as in the table, each with the gradient above the loss.
        by_height = sorted(methods.get_yticks(), reverse=True)
        labels = dict(zip(methods.get_yticks(), methods.get_yticklabels(), strict=True))
        biased = {name for name, row in rows.items() if not row["unbiased"]}
        assert [labels[y].get_text() for y in by_height] == [
            name + (" *" if name in biased else "") for name in rows
        ]
        bars = sorted(methods.patches, key=lambda bar: -bar.get_y())
        assert [bar.get_width() for bar in bars] == [
            row[what][0] for row in rows.values() for what in ("gradient", "loss")
        ]
        # A value beyond the end of the axis is written there.
        end = methods.get_xlim()[1]
        written = {text.get_text() for text in methods.texts}
        assert written == {f"{x:.3g}" for x in (bar.get_width() for bar in bars) if x > end}
        assert [text.get_text() for text in shares.get_legend().get_texts()] == [
            *("A: mask pattern", "B: rate", "C: data", "C, autoregressive")
        ]
        values = [bar.get_height() for bar in shares.patches]
        assert values[0] == found["loss"]["A"][0] / found["loss"]["total"][0]
        top = shares.get_ylim()[1]
        assert max(values[:6]) < top
        assert [text.get_text() for text in shares.texts] == [
            f"↑\n{value:.3g}" for value in values[6:] if value > top
        ]
        # No error bar crosses the number at the end of a cut bar.
        *whole, other = (bars.errorbar[2][0].get_segments() for bars in shares.containers[1::2])
        assert all(np.isfinite(segments).all() for segments in whole)
        assert [bool(np.isfinite(x).all()) for x in other] == [x <= top for x in values[6:]]
        assert [x.get_label() for x in curves.containers] == [
            *("A(t), loss", "B(t), loss", "A(t), gradient", "B(t), gradient")
        ]
    for name in ("figure.png", "figure.svg"):
        draw_figure(found, str(tmp_path / name))
        assert (tmp_path / name).stat().st_size > 5000
    assert "<svg" in (tmp_path / "figure.svg").read_text()


def test_an_interrupted_measurement_goes_on_where_it_was(step, causal, texts, tmp_path):
    few = settings(rows=6, methods=("standard", "mirror"))
    state = State(few)
    measure(step, texts, few, state, causal=causal)
    whole = report(state, few, texts)
    calls, done = [], []

    def interrupted(*args):
        calls.append(1)
        if len(calls) in (20, 60):
            raise KeyboardInterrupt
        return step(*args)

    path = str(tmp_path / "partial")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            measure(interrupted, texts, few, State(few, path), causal=causal)
    state = State(few, path)
    assert len(state.rows) == 4
    measure(interrupted, texts, few, state, done.append, causal)
    assert report(state, few, texts) == whole
    # A row takes 12 calls. Call 20 broke off the second row, and call 60 the fifth.
    assert len(calls) == 60 + 2 * 12
    assert sum(done) == 6 * few.work_per_row == 6 * 3 * 2 * 3
    with pytest.raises(UserError, match="other settings"):
        State(settings(rows=7), path)
    content = (tmp_path / "partial").read_bytes()
    for damaged in (b"no archive", b"", content[: len(content) // 2]):
        (tmp_path / "partial").write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            State(few, path)


def test_a_file_of_measurements_is_the_same_under_numpy_1(tmp_path, monkeypatch):
    """There savez writes every keyword as an array, also the name of a setting of NumPy 2."""
    savez, path, few = np.savez, str(tmp_path / "partial"), settings(rows=2)

    def old_savez(file, **arrays):
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, np.asanyarray(array))

    monkeypatch.setattr(np, "savez", old_savez)
    state = State(few, path)
    state.add({"a": np.ones(3)})
    state.save()
    assert State(few, path).rows[0]["a"].tolist() == [1, 1, 1]
    savez(path + ".npz", identity=np.array(state.identity), setting=np.array(False), a=np.ones(1))
    with pytest.raises(UserError, match="damaged"):
        State(few, path + ".npz")


def test_what_is_kept_is_small(step, texts):
    """Gradients are kept once for each rate and kind of mask, in four bytes per number."""
    few = settings(rows=2)
    state = State(few)
    measure(step, texts, few, state)
    size = sum(x.nbytes for x in state.rows[0].values())
    gradients = 3 * few.rates * 4 * (VOCABULARY * 8 + 8 * VOCABULARY + VOCABULARY)
    assert size - gradients < 1500
    assert {x.dtype for n, x in state.rows[0].items() if n.endswith("mean")} == {np.dtype("f4")}


def test_bad_settings_are_one_line(step, texts, tmp_path):
    for changes in ({"rates": 2}, {"masks": 1}, {"rows": 1}):
        with pytest.raises(UserError, match="--rows 2, --rates 3"):
            settings(**changes)
    with pytest.raises(UserError, match="--batch 6: must be a multiple of 4"):
        settings(batch=6)
    with pytest.raises(UserError, match="--seed -1: must not be negative"):
        settings(seed=-1)
    with pytest.raises(UserError, match="--methods: there is no 'miror'"):
        settings(methods=choose(["miror"], isad=True))
    with pytest.raises(UserError, match="isad needs --isad-token-ids"):
        settings(isad_token_ids=())
    many = settings(rows=401)
    with pytest.raises(UserError, match="400 whole rows and --rows asks for 401"):
        measure(step, texts, many, State(many, str(tmp_path / "state")))
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number(step, texts):
    def broken(text, corruption):
        loss, gradient, hidden = step(text, corruption)
        return loss, gradient * math.nan, hidden

    with pytest.raises(UserError, match="the loss or the gradient of row 0 is NaN or infinite"):
        measure(broken, texts, settings(), State(settings()))


@pytest.mark.parametrize(("rate_per", "rates"), [("row", 1), ("document", 2), ("block", 4)])
def test_each_part_of_a_row_draws_its_own_rate(rate_per, rates, tmp_path):
    """B is known, because the loss is the mean masking probability; masks and texts add nothing.

    A row has two documents of two blocks.
    """
    documents = torch.arange(LENGTH) // 4
    row = ScoredRow(torch.zeros(LENGTH).long(), torch.ones(LENGTH, dtype=torch.bool), documents)

    def step(text, corruption):
        loss = (1.0 / corruption.weight.expand(1, LENGTH)).mean()
        return float(loss), loss[None].float(), 1.0

    own = settings(methods=(), rate_per=rate_per, block_size=2)
    state = State(own)
    measure(step, [row] * ROWS, own, state)
    found = report(state, own, [row] * ROWS)
    expected = (1 - EPS) ** 2 / 12 / rates
    for name in ("loss", "gradient"):
        value, error = found[name]["B"]
        assert value == pytest.approx(expected, abs=4 * error) and error < 0.15 * expected
        assert found[name]["A"][0] == pytest.approx(0.0, abs=1e-6)
    assert bool(found["curves"]) == (rate_per == "row")
    assert f"blocks of 2 tokens, a rate for each {rate_per}" in as_text(found)
    draw_figure(found, str(tmp_path / "x.png"))


@pytest.mark.parametrize("rate_per", ["row", "block"])
def test_rates_of_blocks_meet_the_tail_of_their_weights(rate_per):
    """A is known: tokens with the loss 1, each masked with the probability p, weight 1/p."""
    row = ScoredRow(torch.zeros(LENGTH).long(), torch.ones(LENGTH, dtype=torch.bool))

    def step(text, corruption):
        loss = (corruption.mask * corruption.weight).mean()
        return float(loss), loss[None].float(), 1.0

    own = dataclasses.replace(settings(methods=(), rate_per=rate_per, block_size=2), rows=1500)
    state = State(own)
    measure(step, [row] * own.rows, own, state)
    value, error = report(state, own, [row] * own.rows)["loss"]["A"]
    p = (1 - EPS) * (torch.arange(10**6, dtype=torch.float64) + 0.5) / 10**6 + EPS
    expected = float(((1 - p) / p).mean()) / LENGTH
    assert value == pytest.approx(expected, abs=4 * error) and error < 0.15 * expected


def test_the_table_of_methods_and_blocks_have_conditions():
    with pytest.raises(UserError, match="--rate-per block needs a model with blocks"):
        settings(methods=(), rate_per="block")
    with pytest.raises(UserError, match="--rate-per document goes with --methods none"):
        settings(rate_per="document")
