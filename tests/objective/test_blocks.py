"""Block diffusion against its definition: one forward pass for each block, without clean copies."""

import itertools

import pytest
import torch

from megatron_mdm.objective.blocks import (
    BlockRows,
    block_segments,
    hidden_in_decoding,
    showing_itself,
)
from megatron_mdm.objective.loss import Units, row_losses
from megatron_mdm.objective.segments import counts

VOCAB, MASK_ID = 11, 10
# Two documents: three blocks of 4, the last one short; and two blocks, the last one of one token.
DOCUMENTS = torch.tensor([[0] * 10 + [1] * 5, [0] * 6 + [1] * 9])
SETTINGS = [
    {"shift": shift, "causal_clean": causal, "shift_first_noisy": first}
    for shift, causal, first in itertools.product([False, True], repeat=3)
    if shift or not first
]


class Network(torch.nn.Module):
    """A transformer of two layers in float64 that takes any mask and any positions."""

    def __init__(self, width=8, longest=16):
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def draw(*shape):
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return torch.nn.Parameter(values / shape[-1] ** 0.5)

        self.tokens, self.positions = draw(VOCAB, width), draw(longest, width)
        self.layers = torch.nn.ParameterList([draw(4, width, width) for _ in range(2)])
        self.head = draw(width, VOCAB)

    def forward(self, tokens, positions, seen):
        """Logits [P, V] of P tokens at positions [P]; `seen` [P, P]: may a query see a key."""
        x = self.tokens[tokens] + self.positions[positions]
        for query, key, value, out in self.layers:
            scores = ((x @ query) @ (x @ key).T).masked_fill(~seen, -torch.inf)
            x = x + torch.tanh(scores.softmax(dim=1) @ (x @ value)) @ out
        return x @ self.head


def cross_entropy(logits, tokens):
    return torch.nn.functional.cross_entropy(logits, tokens, reduction="none")


def defined_losses(network, noisy, clean, documents, size, settings):
    """The cross entropy of each token of one row by the definition, and of its next-token loss."""
    found, following = (torch.zeros(len(clean), dtype=torch.float64) for _ in range(2))
    for document in documents.unique():
        at = (documents == document).nonzero()[:, 0]
        n = len(at)
        for start in range(0, n, size):
            end = min(start + size, n)
            tokens = torch.cat([clean[at[:start]], noisy[at[start:end]]])
            positions = torch.arange(end)
            block = positions // size
            seen = block[:, None] >= block[None]
            if settings["causal_clean"]:  # clean tokens; the noisy block sees itself wholly
                seen = (positions[:, None] >= positions[None]) | (positions >= start)[:, None]
            logits = network(tokens, positions, seen)
            if not settings["shift"]:
                found[at[start:end]] = cross_entropy(logits[start:], clean[at[start:end]])
                continue
            if not settings["shift_first_noisy"]:
                first = max(start, 1)
                labels = clean[at[first:end]]
                found[at[first:end]] = cross_entropy(logits[first - 1 : end - 1], labels)
                continue
            found[at[start + 1 : end]] = cross_entropy(logits[start:-1], clean[at[start + 1 : end]])
            if end < n:
                found[at[end]] = cross_entropy(logits[-1:], clean[at[end]][None])[0]
        positions = torch.arange(n)
        logits = network(clean[at], positions, positions[:, None] >= positions[None])
        following[at[1:]] = cross_entropy(logits[:-1], clean[at[1:]])
    return found, following


def drawn(views, generator):
    """Two texts, and masks of their views."""
    clean = torch.randint(0, MASK_ID, DOCUMENTS.shape, generator=generator)
    masks = torch.rand(len(clean) * views, clean.shape[1], generator=generator) < 0.6
    noisy = torch.where(masks, MASK_ID, clean.repeat_interleave(views, dim=0))
    return clean, masks, noisy


def found_losses(network, rows, noisy, clean):
    """The same cross entropies from one forward pass for each text."""
    tokens, positions = rows.interleave(noisy, clean), rows.position_ids()
    seen, labels = ~rows.hidden()[:, 0], rows.labels(clean)
    values = [
        cross_entropy(network(*row), label)
        for *row, label in zip(tokens, positions, seen, labels, strict=True)
    ]
    return rows.to_tokens(torch.stack(values))


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_one_pass_has_the_loss_and_the_gradient_of_the_definition(settings, size, views):
    network = Network()
    clean, masks, noisy = drawn(views, torch.Generator().manual_seed(2))
    rows = BlockRows(DOCUMENTS, size, views, **settings)
    diffusion, following = found_losses(network, rows, noisy, clean)
    eligible = ~torch.zeros_like(clean, dtype=torch.bool)
    if settings["shift"]:  # nothing predicts the first token of a document
        eligible = rows.next_tokens(eligible)
    masks = masks & eligible.repeat_interleave(views, dim=0)
    weights = torch.rand(masks.shape, generator=torch.Generator().manual_seed(3)) + 0.5
    expected, expected_next = zip(
        *(
            defined_losses(network, row, clean[i // views], DOCUMENTS[i // views], size, settings)
            for i, row in enumerate(noisy)
        ),
        strict=True,
    )
    losses = [(torch.stack(expected), diffusion, masks * weights)]
    if settings["causal_clean"]:
        pairs = torch.stack(expected_next[::views]), following
        losses.append((*pairs, rows.next_tokens(eligible).double()))
    parameters = list(network.parameters())
    for one, other, weight in losses:
        torch.testing.assert_close((other * weight).sum(), (one * weight).sum(), rtol=1e-10, atol=0)
        gradients = (
            torch.autograd.grad((x * weight).sum(), parameters, retain_graph=True)
            for x in (one, other)
        )
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shift", [False, True])
def test_blocks_of_one_token_are_an_autoregressive_model(shift):
    """Without shift it is asked with [MASK] after x_<i; with shift it predicts the next token."""
    network, clean = Network(), drawn(1, torch.Generator().manual_seed(8))[0][:1]
    rows = BlockRows(torch.zeros_like(clean), 1, shift=shift)
    found, _ = found_losses(network, rows, torch.full_like(clean, MASK_ID), clean)
    positions = torch.arange(clean.shape[1])
    if shift:
        causal = positions[:, None] >= positions
        logits = network(clean[0], positions, causal)
        expected = cross_entropy(logits[:-1], clean[0, 1:])
        torch.testing.assert_close(found[0, 1:], expected, rtol=1e-12, atol=0)
        return
    for i in positions.tolist():
        tokens = torch.cat([clean[0, :i], torch.tensor([MASK_ID])])
        causal = positions[: i + 1, None] >= positions[: i + 1]
        logits = network(tokens, positions[: i + 1], causal)
        expected = cross_entropy(logits[-1:], clean[0, i : i + 1])
        torch.testing.assert_close(found[0, i : i + 1], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_head_runs_where_tokens_are_predicted(settings):
    rows = BlockRows(DOCUMENTS, 4, 2, **settings)
    _, masks, _ = drawn(2, torch.Generator().manual_seed(4))
    if settings["shift"]:
        masks[:, 0] = False
    following = rows.next_tokens(torch.ones_like(DOCUMENTS, dtype=torch.bool))
    for next_tokens in (None, following):
        at = rows.predicting(masks, next_tokens)
        values = torch.arange(1.0, at.numel() + 1).view(at.shape)
        wanted = rows.to_tokens(values)
        got = rows.to_tokens(torch.where(at, values, 0.0))
        assert torch.equal(got[0][masks], wanted[0][masks])
        if next_tokens is not None:
            assert torch.equal(got[1][following], wanted[1][following])
        needed = {*wanted[0][masks].tolist()}
        if next_tokens is not None:
            needed |= {*wanted[1][following].tolist()}
        assert needed == {*values[at].tolist()}  # and nowhere else


def test_positions_hold_all_copies_of_a_token_side_by_side():
    rows = BlockRows(torch.zeros(1, 4, dtype=torch.long), 2, views=2)
    noisy, clean = torch.arange(8).view(2, 4), torch.arange(10, 14)[None]
    values = rows.interleave(noisy, clean)
    assert values.tolist() == [[0, 4, 10, 1, 5, 11, 2, 6, 12, 3, 7, 13]]
    assert all(map(torch.equal, rows.separate(values), (noisy, clean)))
    assert rows.position_ids().tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]]


def test_blocks_count_from_the_first_token_of_each_document():
    blocks = block_segments(torch.tensor([[0, 0, 0, 0, 0, 1, 1, 3, 3, 3]]), 3)
    assert blocks.tolist() == [[0, 0, 0, 1, 1, 2, 2, 3, 3, 3]]
    assert block_segments(DOCUMENTS, 99).tolist() == DOCUMENTS.tolist()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_nothing_leaks(settings):
    """Logits depend neither on later blocks, nor on other documents, nor on the hidden tokens."""
    network, size = Network(), 4
    rows = BlockRows(DOCUMENTS[:1], size, **settings)
    clean, mask, noisy = (x[:1] for x in drawn(1, torch.Generator().manual_seed(5)))

    def logits(noisy, clean):
        values = network(
            rows.interleave(noisy, clean)[0], rows.position_ids()[0], ~rows.hidden()[0, 0]
        )
        return values[::2], values[1::2]  # of the noisy and of the clean copies

    before = logits(noisy, clean)
    blocks, documents = rows.blocks[0], rows.documents[0]
    for i in range(clean.shape[1]):
        changed_clean = clean.clone()
        changed_clean[0, i] = (clean[0, i] + 1) % MASK_ID
        changed_noisy = torch.where(mask, noisy, changed_clean)
        after = logits(changed_noisy, changed_clean)
        unrelated = (documents != documents[i]) | (blocks < blocks[i])
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[unrelated], b[unrelated])
        # With x_t unchanged: the clean tokens of a block do not reach its noisy tokens.
        own = logits(noisy, changed_clean)[0]
        assert torch.equal(own[blocks == blocks[i]], before[0][blocks == blocks[i]])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [1, 4])
def test_hidden_tokens_are_seen_by_nothing_but_a_position_that_sees_nothing_else(size, causal):
    rows = BlockRows(DOCUMENTS, size, 2, causal_clean=causal)
    hidden_tokens = torch.rand(DOCUMENTS.shape, generator=torch.Generator().manual_seed(6)) < 0.3
    hidden_tokens[0, 0] = hidden_tokens[1, 6] = True  # documents begin with one
    hidden = rows.hidden(hidden_tokens)
    at = hidden_tokens.repeat_interleave(3, dim=1)[:, None, None, :].expand_as(hidden)
    expected, alone = rows.hidden() | at, 0
    for row in expected[:, 0]:
        for position, keys in enumerate(row):
            if keys.all():
                keys[position], alone = False, alone + 1
    assert torch.equal(hidden, expected) and (alone > 0) == (size == 1 or causal)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_nothing_leaks_where_a_document_begins_with_a_hidden_token(settings):
    """All scores of a position may be hidden; these are finite in Megatron, and NaN here."""
    rows = BlockRows(DOCUMENTS[:1], 1, **settings)
    clean, mask, noisy = (x[:1] for x in drawn(1, torch.Generator().manual_seed(5)))
    first = rows.position_ids()[:, ::2] == 0
    seen = ~rows.hidden(first)[0, 0]

    def logits(noisy, clean):
        return Network()(rows.interleave(noisy, clean)[0], rows.position_ids()[0], seen)

    before = logits(noisy, clean)
    assert before.isfinite().all()
    for i in range(clean.shape[1]):
        changed = clean.clone()
        changed[0, i] = (clean[0, i] + 1) % MASK_ID
        after = logits(torch.where(mask, noisy, changed), changed)
        assert torch.equal(after[: 2 * i], before[: 2 * i])


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_masks_of_parts_of_the_positions_are_parts_of_the_mask(settings, views):
    """Context parallelism cuts positions into two chunks for each rank, the first with the last."""
    documents = torch.nn.functional.pad(DOCUMENTS, (0, 1), value=1)
    rows = BlockRows(documents, 4, views, **settings)
    hidden_tokens = torch.rand(documents.shape, generator=torch.Generator().manual_seed(6)) < 0.3
    whole = rows.hidden(hidden_tokens)
    for ranks in (2, 4):
        chunks = torch.arange(16 * (views + 1)).chunk(2 * ranks)
        parts = [torch.cat([chunks[rank], chunks[-1 - rank]]) for rank in range(ranks)]
        gathered = torch.cat([rows.hidden(hidden_tokens, part) for part in parts], dim=2)
        assert torch.equal(gathered[:, :, torch.cat(parts).argsort()], whole)


@pytest.mark.parametrize("of_documents", [False, True])
def test_a_block_counts_by_its_share_of_the_unit(of_documents):
    """The mean over rows, or documents, of the loss of each, whose blocks have L_e of their own."""
    generator = torch.Generator().manual_seed(7)
    _, mask, _ = drawn(1, generator)
    eligible = torch.rand(DOCUMENTS.shape, generator=generator) < 0.8
    eligible[0, 10:] = False  # a document without eligible tokens
    mask &= eligible
    blocks = block_segments(DOCUMENTS, 4)
    ce = torch.rand(DOCUMENTS.shape, generator=generator, dtype=torch.float64)
    weight = torch.rand(DOCUMENTS.shape, generator=generator, dtype=torch.float64)
    parts = DOCUMENTS if of_documents else None
    units = Units(parts, counts(eligible, parts))
    losses = row_losses(ce, mask, weight, counts(eligible, blocks), "rows", blocks, units)
    means = []
    for row in range(2):
        for d in range(2) if of_documents else [None]:
            at = DOCUMENTS[row] == d if of_documents else torch.ones(15, dtype=torch.bool)
            at = at & eligible[row]
            if at.any():
                means.append((ce * mask * weight)[row, at].sum() / at.sum())
    assert losses.denominator == len(means)
    torch.testing.assert_close(losses.numerator, sum(means), rtol=1e-12, atol=0)
    # The losses of the blocks, each weighted by L_e(block) / L_e(unit), have the same sum.
    n = counts(eligible, blocks)
    whole = row_losses(ce, mask, weight, n, "tokens", blocks)
    torch.testing.assert_close((losses.per_row * n).sum(), whole.numerator, rtol=1e-12, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_decoding_hides_the_positions_that_training_hides(causal):
    """Clean tokens see what their clean copies see, and the last block sees as its noisy copy."""
    L, size = 11, 4
    rows = BlockRows(torch.zeros(1, L, dtype=torch.int64), size, causal_clean=causal)
    noisy, clean = torch.arange(0, 2 * L, 2), torch.arange(1, 2 * L, 2)
    for ends in ([], [0, 5]):
        is_end = torch.tensor([i in ends for i in range(L)])
        whole = rows.hidden(is_end[None])[0, 0]

        def decoded(first, end, finished, is_end=is_end):
            hidden = hidden_in_decoding(first, end, finished, size, causal) | is_end[:end]
            return showing_itself(hidden, torch.arange(first, end))

        for end in (3, 4, 7, 8, 11):
            assert torch.equal(decoded(0, end, end), whole[clean[:end]][:, clean[:end]])
            start = (end - 1) // size * size
            copies = torch.cat([clean[:start], noisy[start:end]])
            expected = whole[copies][:, copies]
            assert torch.equal(decoded(0, end, start), expected)
            for first in range(0, start + 1, size):
                assert torch.equal(decoded(first, end, start), expected[first:])


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_pairs_are_those_of_the_mask(views, causal):
    """Tokens at the end of a row are of no use."""
    useful = torch.arange(15).expand_as(DOCUMENTS) < torch.tensor([[13], [15]])
    for size in (1, 4, 16):
        rows = BlockRows(DOCUMENTS, size, views, causal_clean=causal)
        queries = useful.repeat_interleave(rows.copies, dim=1)[:, None, :, None]
        expected = (~rows.hidden(~useful) & queries).sum()
        assert rows.attended_pairs(useful) == expected
