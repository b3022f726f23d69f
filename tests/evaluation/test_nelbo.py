"""The NELBO and its error bars, compared with the exact value by enumeration."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from megatron_mdm.errors import UserError
from megatron_mdm.evaluation.nelbo import (
    ScoredRow,
    cut_rows,
    draw,
    evaluate,
    groups_of,
    lattice_quantiles,
    log_likelihoods,
    num_documents,
    num_masks,
)
from megatron_mdm.objective.randomness import GRID_BITS
from megatron_mdm.objective.reference import objective_coefficients, patterns

VOCABULARY, MASK = 4, 3


def model(tokens):
    """Logits, in float64, that depend on every token of the row."""
    L = tokens.shape[1]
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(8, 4, 8, generator=generator, dtype=torch.float64)
    head = torch.randn(8, 8, VOCABULARY, generator=generator, dtype=torch.float64)
    features = sum(table[i, tokens[:, i]] for i in range(L)).tanh() * 2
    return torch.stack([features @ head[i] for i in range(L)], dim=1)


def oracle_nats(text):
    """The exact NELBO of a text, summed over its tokens, by enumerating all masks."""
    coefficients = objective_coefficients(text.eligible.tolist(), eps=0.0)
    total = 0.0
    for mask, c in zip(patterns(len(text.tokens)), coefficients, strict=True):
        masked = torch.where(torch.tensor(mask), MASK, text.tokens)
        log_p = model(masked[None])[0].log_softmax(-1)
        cross_entropy = -log_p.gather(-1, text.tokens[:, None])[:, 0].numpy()
        total += float(c @ cross_entropy)
    return total * int(text.eligible.sum())


def random_texts(count, seed=0):
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        L = rng.integers(2, 6)
        eligible = torch.from_numpy(rng.random(L) < 0.8)
        texts.append(ScoredRow(torch.from_numpy(rng.integers(0, 3, L)), eligible))
    return texts


@pytest.mark.parametrize("count", [3, 100], ids=["groups of one", "groups of two"])
def test_the_estimate_and_its_error_bar_are_those_of_the_exact_nelbo(count):
    texts = random_texts(count)
    tokens = sum(int(text.eligible.sum()) for text in texts)
    exact = sum(map(oracle_nats, texts)) / tokens
    repetitions = 100
    runs = [
        evaluate(model, texts, MASK, draws=16 if count < 10 else 4, seed=seed).nelbo
        for seed in range(repetitions)
    ]
    errors = np.array([run.value - exact for run in runs])
    spread = errors.std(ddof=1)
    assert abs(errors.mean()) < 4 * spread / np.sqrt(repetitions)
    assert spread < 0.15 * exact
    # The mean of squared error bars is the true variance; with few groups, single ones scatter.
    variance = np.mean([run.draw_stderr**2 for run in runs])
    low, high = stats.chi2.ppf([1e-3, 1 - 1e-3], repetitions - 1) / (repetitions - 1)
    assert low * 0.9 < spread**2 / variance < high * 1.1
    if count > 10:
        inside = sum(abs(e) < 1.96 * run.draw_stderr for e, run in zip(errors, runs, strict=True))
        assert stats.binomtest(inside, repetitions, 0.95).pvalue > 1e-3


def test_the_error_bar_covers_the_choice_of_texts():
    """Over fresh texts of one population, the spread of the estimate is what `stderr` says."""
    runs = [
        evaluate(model, random_texts(40, seed), MASK, draws=2, seed=seed).nelbo
        for seed in range(80)
    ]
    spread = np.var([run.value for run in runs], ddof=1)
    low, high = stats.chi2.ppf([1e-3, 1 - 1e-3], 79) / 79
    assert low * 0.9 < spread / np.mean([run.stderr**2 for run in runs]) < high * 1.1
    masks_alone = np.mean([run.draw_stderr**2 for run in runs])
    assert masks_alone < 0.9 * np.mean([run.stderr**2 for run in runs])


def texts_of_documents(seed, documents, rows):
    """Rows of documents in random order. Each document prefers one token, so its rows are alike."""
    rng = np.random.default_rng(seed)
    texts = []
    for document in range(documents):
        favourite = int(rng.integers(0, 3))
        for _ in range(rows):
            tokens = np.where(rng.random(4) < 0.95, favourite, rng.integers(0, 3, 4))
            origin = torch.full((4,), document)
            texts.append(
                ScoredRow(torch.from_numpy(tokens), torch.ones(4, dtype=torch.bool), origin=origin)
            )
    return [texts[i] for i in rng.permutation(len(texts))]


def test_the_error_bar_is_that_of_the_choice_of_documents():
    """Many rows of few documents say little about a population of documents."""

    def run(texts, seed):
        return evaluate(model, texts, MASK, draws=2, seed=seed, batch_size=64)

    repetitions = 120
    populations = [texts_of_documents(seed, 10, 20) for seed in range(repetitions)]
    runs = [run(texts, seed) for seed, texts in enumerate(populations)]
    assert {run.num_documents for run in runs} == {10}
    spread = np.var([run.nelbo.value for run in runs], ddof=1)
    low, high = stats.chi2.ppf([1e-3, 1 - 1e-3], repetitions - 1) / (repetitions - 1)
    by_document = np.mean([run.nelbo.stderr**2 for run in runs])
    assert low * 0.9 < spread / by_document < high * 1.1
    apart = [
        run([dataclasses.replace(text, origin=None) for text in texts], seed)
        for seed, texts in enumerate(populations[:20])
    ]
    assert {run.num_documents for run in apart} == {200}
    assert spread > 2 * np.mean([run.nelbo.stderr**2 for run in apart])
    assert run(texts_of_documents(0, 1, 8), 0).nelbo.stderr is None


def test_no_document_is_in_two_groups():
    texts = texts_of_documents(0, 200, 3) + texts_of_documents(1, 1, 100)
    groups = groups_of(texts)
    for document in range(200):
        own = [g for g, t in zip(groups, texts, strict=True) if t.origin[0] == document]
        assert len(set(own)) == 1
    assert set(groups) == set(range(groups.max() + 1)) and 50 <= groups.max() + 1 <= 64
    # A row belongs to the document with most of its tokens.
    mixed = [
        dataclasses.replace(texts[0], origin=torch.tensor(origin))
        for origin in ([0, 0, 0, 1], [1, 2, 2, 2], [0, 2, 2, 2])
    ]
    assert groups_of(mixed).tolist() == [0, 1, 1] and num_documents(mixed) == 3


def test_bins_average_to_the_nelbo():
    result = evaluate(model, random_texts(50), MASK, draws=64, num_bins=4)
    assert np.mean([b.value for b in result.bins]) == pytest.approx(result.nelbo.value, rel=0.05)
    assert result.bins[0].value != pytest.approx(result.bins[3].value, rel=0.01)
    fine = evaluate(model, random_texts(1), MASK, draws=2, num_bins=50)
    assert fine.bins.count(None) >= 48
    assert fine.nelbo.stderr is None
    assert all(b.stderr is None for b in fine.bins if b)


def test_quantiles_are_stratified_and_differ_between_replicates():
    unit = lattice_quantiles(np.arange(64) // 8, 2, 4, seed=3) / 2.0**GRID_BITS
    for group in unit.reshape(8, 8, 2, 4).transpose(0, 2, 1, 3).reshape(16, 32):
        counts = np.histogram(group, bins=8, range=(0, 1))[0]
        assert counts.min() >= 3 and counts.max() <= 5
    assert len(np.unique(unit)) == unit.size
    # The texts of a group need not be consecutive.
    order = np.random.default_rng(0).permutation(64)
    other = lattice_quantiles((np.arange(64) // 8)[order], 2, 4, seed=3) / 2.0**GRID_BITS
    assert np.array_equal(np.sort(other, axis=None), np.sort(unit, axis=None))
    one = np.zeros(1, dtype=np.int64)
    first = [lattice_quantiles(one, 2, 1, seed)[0, :, 0] for seed in range(200)]
    assert stats.kstest(np.ravel(first) / 2.0**GRID_BITS, "uniform").pvalue > 1e-3
    correlation = np.corrcoef(np.array(first).T)[0, 1]
    assert abs(correlation) < 4 / np.sqrt(200)


PAIRS = [([0, 1], [2, 1, 0]), ([2], [0]), ([], [1, 1]), ([1, 0], []), ([2], [0, 0, 1, 2, 1, 0])]


def continuation_of(context, continuation):
    tokens = torch.tensor([*context, *continuation])
    return ScoredRow(tokens, torch.arange(len(tokens)) >= len(context))


def test_conditional_likelihood_masks_only_the_continuation():
    """By draws. A continuation that has fewer masks than draws gets the exact value instead."""
    assert [num_masks(len(after), 64) for _, after in PAIRS] == [7, 1, 3, 0, 63]
    texts = [continuation_of(*pair) for pair in PAIRS]
    drawn = draw(model, texts, MASK, 100, 20, 0, np.arange(len(texts)), 50).nats.mean(axis=2)
    for text, replicates in zip(texts, drawn, strict=True):
        spread = replicates.std(ddof=1) / 10
        assert abs(replicates.mean() - oracle_nats(text)) < max(4 * spread, 1e-12)
        assert spread <= 0.02 * replicates.mean()
    for draws in (4, 32, 64):
        results = log_likelihoods(model, PAIRS, MASK, draws=draws)
        for text, (bound, error) in zip(texts, results, strict=True):
            if 2 ** int(text.eligible.sum()) - 1 <= draws:
                assert bound == pytest.approx(-oracle_nats(text), rel=1e-12, abs=1e-15)
                assert error == 0.0
            else:
                assert bound == pytest.approx(-oracle_nats(text), rel=0.5) and error > 0.01
    assert results[3] == (0.0, 0.0)


def test_few_masks_are_enumerated_once():
    """Each mask of a continuation is computed once, in any batch."""
    seen = []

    def watching(tokens):
        seen.extend(tuple(row) for row in tokens.tolist())
        return model(tokens)

    (once,) = log_likelihoods(watching, [([0, 1], [2, 1, 0])], MASK, draws=8)
    tails = itertools.product(*[(token, MASK) for token in (2, 1, 0)])
    assert sorted(seen) == sorted((0, 1, *tail) for tail in tails if MASK in tail)
    seen.clear()
    pairs = [([0, 1], [2, 1, 0]), ([0], [1, 0, 2, 1])]  # equal lengths; 15 masks exceed 8 draws
    both = log_likelihoods(watching, pairs, MASK, draws=8, batch_size=4)
    assert len(seen) == 7 + 8
    assert both[0] == pytest.approx(once, rel=1e-12) and both[0][1] == 0.0 < both[1][1]


def test_the_bound_of_conditionals_of_one_distribution_is_the_likelihood():
    """In closed form: the conditionals, chained in any order, give the joint probability."""
    length, size = 5, 3
    generator = torch.Generator().manual_seed(1)
    joint = torch.rand((size,) * length, generator=generator, dtype=torch.float64) ** 4
    joint /= joint.sum()

    def conditionals(tokens):
        """Logits of each position, given the visible tokens."""
        rows = []
        for row in tokens.tolist():
            seen = joint
            for place, token in enumerate(row):
                if token != MASK:
                    chosen = torch.nn.functional.one_hot(torch.tensor(token), size)
                    seen = seen * chosen.view([-1 if i == place else 1 for i in range(length)])
            others = [[j for j in range(length) if j != i] for i in range(length)]
            rows.append(torch.stack([seen.sum(dim=places) for places in others]).log())
        missing = torch.full((len(rows), length, 1), -torch.inf, dtype=torch.float64)
        return torch.cat([torch.stack(rows), missing], dim=-1)

    tokens = (0, 2, 1, 1, 0)
    marginals = [joint.sum(dim=tuple(range(n, length))) for n in range(1, length + 1)]
    for given in range(length):
        (found,) = log_likelihoods(conditionals, [(tokens[:given], tokens[given:])], MASK, draws=32)
        before = marginals[given - 1][tokens[:given]] if given else torch.tensor(1.0)
        assert found == (pytest.approx((joint[tokens] / before).log().item(), rel=1e-12), 0.0)


def test_a_cross_entropy_that_depends_on_the_number_of_masks_is_summed_over_it():
    """In closed form: if CE = f(k) under k masks, the bound is the sum of f over k."""
    f = [0.3, 2.0, 0.7, 1.1, 5.0, 0.2]

    def by_number(tokens):
        nats = torch.tensor([0.0, *f], dtype=torch.float64)[(tokens == MASK).sum(dim=1)]
        right = -nats[:, None, None].expand(*tokens.shape, 1)
        return torch.cat([right, torch.log(-torch.expm1(right))], dim=-1)

    for n in range(1, 7):
        ((bound, error),) = log_likelihoods(by_number, [([0], [0] * n)], MASK)
        assert bound == pytest.approx(-sum(f[:n]), rel=1e-12) and error == 0.0


def test_rows_of_any_batch_size_are_the_same_numbers():
    texts = random_texts(20)
    one, many = (evaluate(model, texts, MASK, batch_size=b).nelbo for b in (1, 7))
    assert one.value == pytest.approx(many.value, rel=1e-12)


def test_rows_are_cut_without_losing_a_token():
    documents = [[1, 2, 3], [], [4], [5, 6, 7, 8, 9]]
    packed = cut_rows(documents, 4, packed=True)
    assert [row.tolist() for row in packed] == [[1, 2, 3, 4], [5, 6, 7, 8], [9]]
    apart = cut_rows(documents, 4, packed=False)
    assert [row.tolist() for row in apart] == [[1, 2, 3], [4], [5, 6, 7, 8], [9]]
    for length in range(9):
        rows = cut_rows([range(length + 1)], 4, packed=False, overlap=1)
        assert [i for row in rows for i in row[1:].tolist()] == list(range(1, length + 1))
        assert all(2 <= len(row) <= 4 for row in rows)
        assert all(a[-1] == b[0] for a, b in itertools.pairwise(rows))


def test_bad_input_is_one_line():
    text = random_texts(1)
    with pytest.raises(UserError, match="even"):
        evaluate(model, text, MASK, draws=3)
    with pytest.raises(UserError, match="multiple of 4"):
        log_likelihoods(model, [([], [1])], MASK, draws=6)
    with pytest.raises(UserError, match="text 0 contains the mask token 3"):
        evaluate(model, [ScoredRow(torch.tensor([MASK]), torch.tensor([True]))], MASK)
    with pytest.raises(UserError, match="no tokens"):
        evaluate(model, [ScoredRow(torch.tensor([1]), torch.tensor([False]))], MASK)
    for value in (torch.nan, torch.inf):
        with pytest.raises(UserError, match="the likelihood of a text is NaN or 0"):
            evaluate(lambda tokens: torch.full((*tokens.shape, 4), value), text, MASK)  # noqa: B023


def test_bounds_in_blocks_are_sums_over_blocks_given_clean_ones():
    """All masks of a row, and rates and counts of blocks, give the same bounds."""
    size, context, after = 2, [0, 1, 2], [1, 0, 2, 1]

    def logits(tokens, clean, documents):
        assert not documents.any()
        blocks = [
            model(torch.cat([clean[:, :start], tokens[:, start : start + size]], dim=1))[:, start:]
            for start in range(0, tokens.shape[1], size)
        ]
        return torch.cat(blocks, dim=1)

    row, exact = torch.tensor([*context, *after]), 0.0
    for start in range(2, len(row), size):
        text = row[: start + size]
        places = torch.arange(len(text))
        exact -= oracle_nats(ScoredRow(text, (places >= start) & (places >= len(context))))
    ((bound, error),) = log_likelihoods(logits, [(context, after)], MASK, draws=16, block_size=size)
    assert (bound, error) == (pytest.approx(exact, rel=1e-12), 0.0)
    drawn = log_likelihoods(logits, [(context, after)] * 400, MASK, draws=8, block_size=size)
    bounds = [bound for bound, _ in drawn]
    assert np.mean(bounds) == pytest.approx(exact, abs=4 * stats.sem(bounds))
    assert stats.sem(bounds) < 0.01 * abs(exact)


def test_blocks_have_rates_and_counts_of_their_own():
    """Documents, prompts, a short last block; bins hold blocks by their own rates."""
    size, texts = 2, []
    for number, documents in enumerate(([0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1])):
        row = random_texts(1, number)[0]
        tokens = torch.arange(len(documents)) % 3
        row = ScoredRow(tokens, torch.ones(len(tokens)) > 0, torch.tensor(documents))
        texts.append(dataclasses.replace(row, eligible=tokens != number))

    def logits(tokens, clean, documents):
        found = torch.zeros(*tokens.shape, VOCABULARY, dtype=torch.float64)
        for b, document in enumerate(documents):
            for i, (start, end) in blocks_of(document, size):
                text = torch.cat([clean[b, start:i], tokens[b, i:end]])
                found[b, i:end] = model(text[None])[0, i - start :]
        return found

    exact = 0.0
    for row in texts:
        for i, (start, end) in blocks_of(row.documents, size):
            inside = row.eligible[start:end] & (torch.arange(start, end) >= i)
            exact += oracle_nats(ScoredRow(row.tokens[start:end], inside))
    exact /= sum(int(row.eligible.sum()) for row in texts)
    results = [
        evaluate(logits, texts, MASK, draws=8, seed=seed, num_bins=3, block_size=size)
        for seed in range(200)
    ]
    found = [result.nelbo.value for result in results]
    assert np.mean(found) == pytest.approx(exact, abs=4 * stats.sem(found))
    assert stats.sem(found) < 0.01 * exact
    bins = np.mean([[x.value for x in result.bins] for result in results], axis=0)
    assert bins.mean() == pytest.approx(exact, rel=0.03) and np.ptp(bins) > 0.1
    one = evaluate(logits, texts, MASK, draws=2, block_size=size)
    assert one.num_tokens == sum(int(row.eligible.sum()) for row in texts)


def blocks_of(document, size):
    """The first position of each block, and where its document begins and the block ends."""
    starts = [i for i in range(len(document)) if i == 0 or document[i] != document[i - 1]]
    for start, end in itertools.pairwise([*starts, len(document)]):
        for i in range(start, end, size):
            yield i, (start, min(i + size, end))


def test_blocks_of_one_token_have_no_sampling_error():
    def logits(tokens, clean, documents):
        length = tokens.shape[1]
        found = [
            model(torch.cat([clean[:, :i], tokens[:, i : i + 1]], dim=1))[:, i]
            for i in range(length)
        ]
        return torch.stack(found, dim=1)

    tokens = torch.tensor([0, 2, 1, 1, 0])
    text = ScoredRow(tokens, tokens >= 0, torch.zeros(5).long())
    one, other = (
        evaluate(logits, [text], MASK, draws=2, seed=s, block_size=1).nelbo for s in (0, 1)
    )
    assert one.value == pytest.approx(other.value, rel=1e-12)
    assert one.draw_stderr == pytest.approx(0.0, abs=1e-12)
