"""The decoder, compared with LLaDA's published algorithm in loops over exact probabilities."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from megatron_mdm.errors import UserError
from megatron_mdm.generation.decoder import Decoder, filling_order

V, MASK, END = 12, 9, 8


def model(tokens):
    """Position i prefers token i, with more confidence for smaller i, and most of all the mask."""
    L = tokens.shape[1]
    logits = torch.zeros(*tokens.shape, V)
    for i in range(L):
        logits[:, i, i % 8] = 5.0 + L - i
    logits[..., MASK] = 100.0
    return logits


def random_model(seed, L=40, scale=2.0):
    """Logits of each position depend on all tokens of the row, so the order matters."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(L, V, generator=generator, dtype=torch.float64)
    table = torch.randn(L, L, V, V, generator=generator, dtype=torch.float64) * 0.5

    def logits(tokens):
        s = tokens.shape[1]
        j = torch.arange(s)
        rows = [own[:s] + table[:s, :s][:, j, row].sum(dim=1) for row in tokens]
        return scale * torch.stack(rows)

    return logits


def published(logits, tokens, gen_length, block_length, steps):
    """LLaDA's block-wise generation with low-confidence remasking, greedy, for one row (a list).

    There is one change: the mask token is never predicted, which LLaDA's release leaves to the
    model. Its probability still counts in the confidence of the other tokens.
    """
    x = list(tokens)
    start = len(x) - gen_length
    assert gen_length % block_length == 0 and steps % (gen_length // block_length) == 0
    steps_per_block = steps // (gen_length // block_length)
    for first in range(start, len(x), block_length):
        block = range(first, first + block_length)
        base, remainder = divmod(sum(x[i] == MASK for i in block), steps_per_block)
        for step in range(steps_per_block):
            scores = logits(torch.tensor([x]))[0].tolist()
            ranking = []
            for i in block:
                if x[i] == MASK:
                    weights = [math.exp(score) for score in scores[i]]
                    best = max((w, -v) for v, w in enumerate(weights) if v != MASK)
                    ranking.append((best[0] / sum(weights), i, -best[1]))
            ranking.sort(reverse=True)
            for _, i, token in ranking[: base + (step < remainder)]:
                x[i] = token
    return x


@pytest.mark.parametrize(
    "block_length, steps", [(24, 24), (24, 7), (8, 24), (8, 9), (4, 6), (2, 36)]
)
@pytest.mark.parametrize("mask_bias", [0.0, -math.inf])
def test_greedy_decoding_is_the_published_algorithm(block_length, steps, mask_bias):
    for seed in range(5):
        plain = random_model(seed)

        def logits(tokens, plain=plain):
            scores = plain(tokens)
            scores[..., MASK] += mask_bias
            return scores

        prompts = torch.randint(0, 8, (3, 5), generator=torch.Generator().manual_seed(seed))
        rows = torch.cat([prompts, torch.full((3, 24), MASK)], dim=1)
        decoder = Decoder(MASK, steps=steps, block_length=block_length)
        ours = decoder(logits, rows).tolist()
        assert ours == [published(logits, row, 24, block_length, steps) for row in rows.tolist()]


def test_fills_every_mask_and_keeps_the_rest():
    tokens = torch.tensor([[7, MASK, MASK, MASK], [MASK, MASK, 7, 7], [1, 2, 3, 4]])
    for steps in (1, 2, 3, 50, None):
        for block_length in (None, 3, 99):
            filled = Decoder(MASK, steps, block_length)(model, tokens)
            assert filled.tolist() == [[7, 1, 2, 3], [0, 1, 7, 7], [1, 2, 3, 4]]
    assert tokens[0, 1] == MASK  # the argument is not changed


def masked_at(decoder, tokens, logits=model):
    """The masked positions of the first row at each call of the model."""
    calls = []

    def recording(tokens):
        calls.append((tokens[0] == MASK).nonzero().flatten().tolist())
        return logits(tokens)

    decoder(recording, tokens)
    return calls


def test_confident_positions_come_first():
    row = torch.full((1, 5), MASK)
    assert masked_at(Decoder(MASK, steps=3), row) == [[0, 1, 2, 3, 4], [2, 3, 4], [4]]


@pytest.mark.parametrize(
    "length, block_length, steps, expected",
    [
        (10, 4, None, [1] * 10),  # one call per token, two in the last block
        (10, 4, 3, [4, 4, 2]),
        (10, 4, 5, [2, 2, 2, 2, 2]),  # with 2, 2 and 1 calls
        (10, 4, 99, [1] * 10),
        (5, 8, 2, [3, 2]),
    ],
)
def test_blocks_that_do_not_divide_the_length(length, block_length, steps, expected):
    row = torch.full((1, length), MASK)
    states = list(Decoder(MASK, steps, block_length).states(model, row))
    left = [int((state == MASK).sum()) for state in states]
    assert [a - b for a, b in itertools.pairwise(left)] == expected
    order = filling_order(states, MASK)[0].tolist()
    assert sorted(order, key=lambda call: call) == order  # blocks and `model` go from the left
    assert Counter(order) == Counter({call + 1: n for call, n in enumerate(expected)})


def test_gaps_are_filled_in_blocks_of_masked_positions():
    """Given tokens between masked positions are not counted, and stay."""
    row = torch.tensor([[MASK, 5, MASK, 5, 5, MASK, MASK, 5]])
    assert masked_at(Decoder(MASK, steps=2, block_length=2), row) == [[0, 2, 5, 6], [5, 6]]
    assert Decoder(MASK)(model, row).tolist() == [[0, 5, 2, 5, 5, 5, 6, 5]]


def test_rows_of_a_batch_do_not_see_each_other():
    """Greedy and sampled decoding, for rows with different numbers of gaps and of calls."""
    logits = random_model(3)
    rows = torch.randint(0, 8, (4, 20), generator=torch.Generator().manual_seed(0))
    for row, gaps in zip(rows, (0, 3, 11, 20), strict=True):
        row[20 - gaps :] = MASK
    for decoder in (
        Decoder(MASK, steps=6, block_length=4, end_token_ids=(END,)),
        Decoder(MASK, block_length=5, temperature=1.0),
        Decoder(MASK, remasking="random", steps=5),
        Decoder(MASK, threshold=0.4, temperature=0.5),
        Decoder(MASK, temperature=1.0, top_k=5, top_p=0.8, cfg_scale=0.5),
    ):
        seeded = [torch.Generator().manual_seed(i) for i in range(4)]
        together = decoder(logits, rows, seeded)
        for i in range(4):
            alone = decoder(logits, rows[i : i + 1], [torch.Generator().manual_seed(i)])
            assert torch.equal(together[i], alone[0])


def test_threshold_keeps_the_confident_and_at_least_one():
    def logits(tokens):
        probabilities = torch.full((1, 6, V), 0.0)
        for i, p in enumerate((0.95, 0.5, 0.9, 0.6, 0.91, 0.3)):
            probabilities[0, i] = (1 - p) / (V - 1)
            probabilities[0, i, i] = p
        return probabilities.log()

    row = torch.full((1, 6), MASK)
    calls = masked_at(Decoder(MASK, threshold=0.9001), row, logits)
    assert calls == [[0, 1, 2, 3, 4, 5], [1, 2, 3, 5], [1, 3, 5], [1, 5], [5]]
    # The same in blocks, and with a number of calls that keeps at least two tokens each.
    calls = masked_at(Decoder(MASK, threshold=0.9001, block_length=3), row, logits)
    assert calls == [[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 3, 4, 5], [3, 4, 5], [3, 5], [5]]
    calls = masked_at(Decoder(MASK, threshold=0.9001, steps=3), row, logits)
    assert calls == [[0, 1, 2, 3, 4, 5], [1, 2, 3, 5], [1, 5]]
    assert len(masked_at(Decoder(MASK, threshold=1e-9), row, logits)) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_samples_from_the_tempered_softmax(temperature):
    """A chi-squared test of 20,000 draws. The mask token and ids of the padding never appear."""
    n = 20_000
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 0.3, 0.0, -0.5, 1.5, 9.0, 9.0, 9.0])
    decoder = Decoder(MASK, steps=1, temperature=temperature, vocab_size=10)
    generator = torch.Generator().manual_seed(1)
    drawn = decoder(lambda x: scores.expand(1, n, V), torch.full((1, n), MASK), [generator])
    expected = (scores[:9] / temperature).softmax(dim=0) * n
    counts = torch.bincount(drawn[0], minlength=V)
    assert counts[9:].tolist() == [0, 0, 0]
    assert ((counts[:9] - expected) ** 2 / expected).sum() < 29.6  # 8 degrees, p = 2.5e-4
    other = decoder(lambda x: scores.expand(1, n, V), torch.full((1, n), MASK), [generator])
    assert not torch.equal(drawn, other)


def guided(logits, tokens, gen_length, block_length, steps, scale):
    """`published` with LLaDA's classifier-free guidance: a second row hides the prompt."""
    prompt = tokens[: len(tokens) - gen_length]

    def both(batch):
        (x,) = batch.tolist()
        hidden = [MASK] * len(prompt) + x[len(prompt) :]
        conditional, unconditional = logits(torch.tensor([x, hidden]))
        return (unconditional + (scale + 1) * (conditional - unconditional))[None]

    return published(both, tokens, gen_length, block_length, steps)


@pytest.mark.parametrize("block_length, steps", [(24, 24), (24, 7), (8, 9)])
def test_guidance_is_the_published_one(block_length, steps):
    changed = 0
    for seed in range(4):
        plain = random_model(seed, scale=0.5)

        def logits(tokens, plain=plain):
            scores = plain(tokens)
            scores[..., V - 1] = -torch.inf  # like padding of the vocabulary
            return scores

        prompts = torch.randint(0, 8, (3, 5), generator=torch.Generator().manual_seed(seed))
        rows = torch.cat([prompts, torch.full((3, 24), MASK)], dim=1)
        settings = {"steps": steps, "block_length": block_length}
        ours = Decoder(MASK, cfg_scale=1.5, **settings)(logits, rows).tolist()
        finite = lambda tokens, plain=plain: plain(tokens)[..., : V - 1]  # noqa: E731
        wanted = [guided(finite, row, 24, block_length, steps, 1.5) for row in rows.tolist()]
        assert ours == wanted
        changed += ours != Decoder(MASK, **settings)(logits, rows).tolist()
    assert changed > 1


def test_guidance_hides_every_given_token_and_takes_two_calls():
    """Tokens written before are visible in both calls. A scale of 0 takes one call."""
    row = torch.tensor([[5, MASK, 6, MASK, 7]])
    calls = []

    def recording(tokens):
        calls.append(tokens[0].tolist())
        return model(tokens)

    Decoder(MASK, cfg_scale=0.5)(recording, row)
    assert calls == [
        [5, MASK, 6, MASK, 7], [MASK] * 5, [5, 1, 6, MASK, 7], [MASK, 1, MASK, MASK, MASK]
    ]  # fmt: skip
    calls.clear()
    Decoder(MASK, cfg_scale=0.0)(recording, row)
    assert len(calls) == 2


def test_the_likeliest_alone_is_greedy_and_all_of_them_no_filter():
    """This holds for ties too, of which greedy decoding takes the first."""
    logits = random_model(5, scale=1.0)

    def tied(tokens):
        return logits(tokens).round()

    row = torch.tensor([[1, 2, 3, *[MASK] * 20]])

    def drawn(source, **settings):
        decoder = Decoder(MASK, block_length=5, vocab_size=11, **settings)
        return decoder(source, row, [torch.Generator().manual_seed(3)])

    for source in (logits, tied):
        greedy = drawn(source)
        assert torch.equal(drawn(source, temperature=2.0, top_k=1), greedy)
        assert torch.equal(drawn(source, temperature=2.0, top_p=1e-9), greedy)
        free = drawn(source, temperature=2.0)
        assert not torch.equal(free, greedy)
        for off in ({"top_k": V}, {"top_k": 10}, {"top_k": 99, "top_p": 1.0}):
            assert torch.equal(drawn(source, temperature=2.0, **off), free)


def test_filtered_scores_are_bitwise_those_that_were_given():
    scores = torch.randn(50, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores[:, MASK] = -torch.inf
    for top_k, top_p in ((V, 1.0), (4, 1.0), (None, 0.7), (6, 0.5)):
        kept = Decoder(MASK, temperature=0.7, top_k=top_k, top_p=top_p)._likeliest(scores)
        assert torch.equal(torch.where(kept == -torch.inf, scores, kept), scores)
        if top_p == 1.0:
            assert (kept > -torch.inf).sum(dim=1).tolist() == [min(top_k, V - 1)] * 50


def enumerated(scores, temperature, top_k, top_p):
    """Probabilities token by token: tempered, cut to the k largest, then to the mass p."""
    allowed = [v for v in range(10) if v != MASK]
    weights = {v: math.exp(scores[v] / temperature) for v in allowed}
    ranked = sorted(allowed, key=lambda v: -weights[v])[:top_k]
    mass, kept = sum(weights[v] for v in ranked), []
    for v in ranked:
        if sum(weights[u] for u in kept) / mass >= top_p:
            break
        kept.append(v)
    total = sum(weights[v] for v in kept)
    return {v: weights[v] / total for v in kept}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "count"),
    [(1.0, 4, 1.0, 4), (0.5, None, 0.9, 3), (2.0, None, 0.6, 4), (2.0, 5, 0.6, 3)],
)
def test_draws_among_the_likeliest(temperature, top_k, top_p, count):
    """Chi-squared against an enumeration, 20,000 draws. Filters do not change confidences."""
    n = 20_000
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 0.3, 0.0, -0.5, 1.5, 9.0, 9.0, 9.0])
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "vocab_size": 10}
    decoder = Decoder(MASK, steps=1, **settings)
    generator = torch.Generator().manual_seed(1)
    drawn = decoder(lambda x: scores.expand(1, n, V), torch.full((1, n), MASK), [generator])
    wanted = enumerated(scores.tolist(), temperature, top_k, top_p)
    counts = Counter(drawn[0].tolist())
    assert counts.keys() == wanted.keys() and len(wanted) == count
    statistic = sum((counts[v] - n * p) ** 2 / (n * p) for v, p in wanted.items())
    assert statistic < 20.5  # at most 4 degrees of freedom, p = 4e-4
    candidates = torch.ones(1, 50, dtype=torch.bool)
    picks, confidence = decoder._predict(scores.double().expand(50, V).clone(), candidates, None)
    assert torch.equal(confidence, scores.double().softmax(dim=0)[picks])


def test_random_remasking_fills_in_any_order_with_the_likeliest_tokens():
    orders = Counter()
    for seed in range(600):
        states = list(
            Decoder(MASK, remasking="random").states(
                model, torch.full((1, 3), MASK), [torch.Generator().manual_seed(seed)]
            )
        )
        assert states[-1].tolist() == [[0, 1, 2]]
        orders[tuple(filling_order(states, MASK)[0].tolist())] += 1
    assert len(orders) == 6
    assert sum((n - 100) ** 2 / 100 for n in orders.values()) < 22  # 5 degrees, p = 5e-4


@pytest.mark.parametrize("block_length", [None, 4])
def test_an_end_token_saves_calls_and_changes_nothing_before_it(block_length):
    ended = 0
    for seed in range(20):
        logits = random_model(seed)
        row = torch.tensor([[1, 2, MASK, 3, *[MASK] * 16]])
        whole = Decoder(MASK, block_length=block_length)
        early = Decoder(MASK, block_length=block_length, end_token_ids=(END,))
        a, b = whole(logits, row)[0].tolist(), early(logits, row)[0].tolist()
        assert MASK not in b
        if END in a[4:]:
            ended += 1
            stop = a.index(END, 4)
            assert b[: stop + 1] == a[: stop + 1]
            assert len(masked_at(early, row, logits)) <= len(masked_at(whole, row, logits))
        else:
            assert a == b
    assert ended > 3


def test_an_end_token_before_given_text_ends_nothing():
    def logits(tokens):
        scores = torch.zeros(*tokens.shape, V)
        scores[..., END] = 5.0
        scores[:, -1, END], scores[:, -1, 3] = 0.0, 5.0
        return scores

    row = torch.tensor([[MASK, MASK, 1, MASK]])
    decoder = Decoder(MASK, block_length=1, end_token_ids=(END,))
    assert decoder(logits, row).tolist() == [[END, END, 1, 3]]
    row = torch.tensor([[1, MASK, MASK, MASK]])
    assert decoder(logits, row).tolist() == [[1, END, END, END]]
    assert len(masked_at(decoder, row, logits)) == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"block_length": -1}, "--block-length must be at least 1, got -1"),
        ({"temperature": -0.1}, "--temperature must be 0 or more, got -0.1"),
        ({"temperature": math.nan}, "--temperature"),
        ({"temperature": math.inf}, "--temperature"),
        ({"cfg_scale": -1.0}, "--cfg-scale must be 0 or more, got -1.0"),
        ({"top_k": 0, "temperature": 1.0}, "--top-k must be at least 1, got 0"),
        ({"top_p": 0.0, "temperature": 1.0}, r"--top-p must lie in \(0, 1\], got 0.0"),
        ({"top_p": math.nan, "temperature": 1.0}, "--top-p must lie in"),
        ({"top_k": 5}, "--top-k needs a --temperature above 0"),
        ({"top_p": 0.5}, "--top-p needs a --temperature above 0"),
        ({"remasking": "best"}, "--remasking is low-confidence or random, not best"),
        ({"threshold": 0.0}, "--threshold must lie in"),
        ({"threshold": 1.1}, "--threshold must lie in"),
        ({"threshold": 0.5, "remasking": "random"}, "--threshold needs --remasking low-confidence"),
        ({"end_token_ids": (MASK,)}, "the mask token 9 cannot end a text"),
        ({"end_token_ids": (-1,)}, "--eos-token-ids -1: the vocabulary has no such id"),
        ({"end_token_ids": (10,), "vocab_size": 10}, "--eos-token-ids 10: the vocabulary has no"),
        ({"steps": 2, "block_length": 2}, "--steps 2 is less than one per block: 3 blocks"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(UserError, match=message):
        Decoder(MASK, **settings)(model, torch.full((2, 6), MASK))


@pytest.mark.parametrize("remasking", ["low-confidence", "random"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers(remasking, value):
    def logits(tokens):
        scores = torch.zeros(*tokens.shape, 5)
        scores[0, 1, 2] = value
        return scores

    with pytest.raises(UserError, match="the model's logits hold NaN or infinity"):
        Decoder(4, remasking=remasking)(logits, torch.tensor([[1, 4, 4]]))


def in_blocks(plain, size):
    """The logits of the last block, from those of all its row."""
    return lambda tokens: plain(tokens)[:, (tokens.shape[1] - 1) // size * size :]


def published_in_blocks(logits, tokens, size, steps, threshold, surest=False):
    """Greedy decoding in blocks as SDAR and LLaDA2.0 release it, for one row (a list).

    Blocks count from the first token, prompt included, and `steps` calls share each block. A call
    keeps all tokens above the threshold, if they are at least as many as its share, and its share
    of the most confident tokens otherwise. A probability is that of the softmax; `surest`: it is 1
    for every token, which is the probability after SDAR's filter with top_k = 1.
    """
    x = list(tokens)
    calls = 0
    for start in range(0, len(x), size):
        block = range(start, min(start + size, len(x)))
        for step in range(steps):
            ranking = []
            hidden = [i for i in block if x[i] == MASK]
            if not hidden:
                break
            scores = logits(torch.tensor([x[: block.stop]]))[0].tolist()
            calls += 1
            for i in hidden:
                weights = [math.exp(score) for score in scores[i - start]]
                best = max((w, -v) for v, w in enumerate(weights) if v != MASK)
                ranking.append((1.0 if surest else best[0] / sum(weights), -i, -best[1]))
            share = size // steps + (step < size % steps)
            confident = [choice for choice in ranking if choice[0] > threshold]
            if len(confident) < share:
                confident = sorted(ranking, reverse=True)[:share]
            for _, i, token in confident:
                x[-i] = token
    return x, calls


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("threshold", [None, 0.2, 0.5])
def test_decoding_in_blocks_is_the_published_algorithm(size, threshold):
    for seed in range(5):
        logits = in_blocks(random_model(seed), size)
        for prompt, steps in ((size, 1), (2 * size, size // 2), (size, size), (size + 1, size)):
            tokens = [*(i % 8 for i in range(prompt)), *[MASK] * (4 * size - prompt)]
            blocks = -(-(len(tokens) - prompt) // size)
            number = None if steps == size else steps * blocks
            decoder = Decoder(MASK, steps=number, block_size=size, threshold=threshold)
            expected, calls = published_in_blocks(logits, tokens, size, steps, threshold or 2.0)
            states = list(decoder.states(logits, torch.tensor([tokens])))
            assert states[-1][0].tolist() == expected
            assert len(states) == 1 + calls


def test_one_call_for_a_block_is_sdars_sampling_with_top_k_1():
    """Its probabilities are those after the filter, so every token exceeds every threshold."""
    logits = in_blocks(random_model(7), 4)
    tokens = [*range(6), *[MASK] * 14]
    expected, calls = published_in_blocks(logits, tokens, 4, 4, 0.85, surest=True)
    found = Decoder(MASK, steps=calls, block_size=4)(logits, torch.tensor([tokens]))
    assert calls == 4 and found[0].tolist() == expected


def test_rows_in_other_blocks_wait_for_each_other():
    """A row has the text that it has alone, and no call sees a position after its block."""
    plain = random_model(3)
    rows = [[*range(2), *[MASK] * 14], [*range(7), *[MASK] * 9], [*[1] * 15, MASK], [1] * 16]
    seen = []

    def logits(tokens):
        start = (tokens.shape[1] - 1) // 4 * 4
        assert not (tokens[:, :start] == MASK).any()
        seen.append(tokens.shape[1])
        return plain(tokens)[:, start:]

    decoder = Decoder(MASK, block_size=4, threshold=0.3, end_token_ids=(END,))
    together = decoder(logits, torch.tensor(rows))
    assert seen == sorted(seen) and set(seen) <= {4, 8, 12, 16}
    for row, found in zip(rows, together, strict=True):
        assert torch.equal(decoder(logits, torch.tensor([row]))[0], found)
    sampled = Decoder(MASK, block_size=4, temperature=1.0)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    together = sampled(logits, torch.tensor(rows), generators)
    for i, row in enumerate(rows):
        alone = sampled(logits, torch.tensor([row]), [torch.Generator().manual_seed(i)])
        assert torch.equal(alone[0], together[i])


def test_blocks_of_the_model_refuse_flags_for_whole_rows():
    for name, value in (("block_length", 8), ("cfg_scale", 1.0)):
        with pytest.raises(UserError, match="is for models that read whole rows, and this one has"):
            Decoder(MASK, block_size=4, **{name: value})
    with pytest.raises(UserError, match="2 is less than one per block: 3 blocks of 4 tokens"):
        Decoder(MASK, block_size=4, steps=2)(lambda _: None, torch.tensor([[1] * 4 + [MASK] * 12]))


def published_with_editing(logits, tokens, size, threshold, edit_threshold, steps, end=None):
    """Greedy decoding as LLaDA2.1 releases it, for one row (a list), and what it did.

    A call fills the masked positions of the block above the threshold, or the most confident one.
    It replaces tokens that were written before, where another one is the likeliest and above
    `edit_threshold`. A full block gets calls until one replaces nothing, and at most `steps`. The
    row ends with the block that has the token `end`, and the rest gets this token, as in ours.

    Returns:
        The row; the number of calls; the numbers of edits while the block had masked positions and
        afterwards; the number of blocks whose editing stopped because of `steps`.
    """
    x = list(tokens)
    written = [token == MASK for token in x]
    calls, edits, stopped = 0, [0, 0], 0
    for start in range(0, len(x), size):
        block = range(start, min(start + size, len(x)))
        if not any(x[i] == MASK for i in block):
            continue
        after = 0
        while True:
            hidden = [i for i in block if x[i] == MASK]
            if not hidden:
                after += 1
            if after > steps:
                stopped += steps > 0
                break
            scores = logits(torch.tensor([x[: block.stop]]))[0].tolist()
            calls += 1
            choices = {}
            for i in block:
                weights = [math.exp(score) for score in scores[i - start]]
                best = max((w, -v) for v, w in enumerate(weights) if v != MASK)
                choices[i] = best[0] / sum(weights), -best[1]
            fill = [i for i in hidden if choices[i][0] > threshold]
            if hidden and not fill:
                fill = [max(hidden, key=lambda i: choices[i][0])]
            edit = [
                i
                for i in block
                if written[i] and x[i] not in (MASK, choices[i][1])
                if choices[i][0] > edit_threshold
            ]
            for i in fill + edit:
                x[i] = choices[i][1]
            edits[not hidden] += len(edit)
            if not hidden and not edit:
                break
        if end in [x[i] for i in block if written[i]]:
            return x[: block.stop] + [end] * (len(x) - block.stop), calls, edits, stopped
    return x, calls, edits, stopped


@pytest.mark.parametrize("end", [None, END])
@pytest.mark.parametrize("steps", [0, 2, None])
def test_editing_is_the_published_algorithm(steps, end):
    """The likeliest token of `random_model` depends on all others, so that it changes its mind."""
    seen = Counter()
    for size, threshold, edit_threshold in [
        (4, 0.2, 0.0), (4, 0.5, 0.3), (4, 0.9, 0.6), (8, 0.2, 0.3), (8, 0.5, 0.0), (8, 0.5, 1.0)
    ]:  # fmt: skip
        for seed in range(4):
            logits = in_blocks(random_model(seed), size)
            decoder = Decoder(
                MASK,
                block_size=size,
                threshold=threshold,
                edit_threshold=edit_threshold,
                edit_steps=steps,
                end_token_ids=() if end is None else (end,),
            )
            for prompt in (0, size, size + 1, 2 * size - 1):
                tokens = [*(i % 8 for i in range(prompt)), *[MASK] * (4 * size + 2 - prompt)]
                expected, calls, edits, stopped = published_with_editing(
                    logits,
                    tokens,
                    size,
                    threshold,
                    edit_threshold,
                    16 if steps is None else steps,
                    end,
                )
                states = list(decoder.states(logits, torch.tensor([tokens])))
                assert states[-1][0].tolist() == expected
                assert len(states) == 1 + calls
                seen.update(
                    during=edits[0], after=edits[1], stopped=stopped, ended=end in expected[prompt:]
                )
                if edit_threshold == 1.0 and end is None:
                    plain = replace(decoder, edit_threshold=None, edit_steps=None)
                    assert (
                        edits == [0, 0]
                        and plain(logits, torch.tensor([tokens]))[0].tolist() == expected
                    )
    assert seen["during"] > 50
    assert (seen["after"] > 50, seen["stopped"] > 5) == (steps != 0, steps != 0)
    assert (seen["ended"] > 20) == (end is not None)


def test_editing_rows_wait_for_each_other_and_finished_blocks_stay():
    """A row has the text that it has alone, although rows finish a block at different calls."""
    plain = random_model(3)
    rows = [[*range(2), *[MASK] * 14], [*range(7), *[MASK] * 9], [*[1] * 15, MASK], [1] * 16]
    before, seen = {}, []

    def logits(tokens):
        start = (tokens.shape[1] - 1) // 4 * 4
        # What a cache keeps of a row never changes.
        assert torch.equal(tokens[:, :start], before.setdefault(start, tokens[:, :start].clone()))
        seen.append(tokens.shape[1])
        return plain(tokens)[:, start:]

    settings = {"block_size": 4, "threshold": 0.3, "edit_threshold": 0.2, "edit_steps": 3}
    for decoder in (
        Decoder(MASK, end_token_ids=(END,), **settings),
        Decoder(MASK, temperature=1.0, **settings),
        Decoder(MASK, steps=8, **settings),
    ):
        before.clear(), seen.clear()
        generators = [torch.Generator().manual_seed(i) for i in range(4)]
        together = decoder(logits, torch.tensor(rows), generators)
        assert seen == sorted(seen) and set(seen) == {4, 8, 12, 16}
        for i, row in enumerate(rows):
            before.clear()
            generator = torch.Generator().manual_seed(i)
            alone = decoder(logits, torch.tensor([row]), [generator])
            assert torch.equal(alone[0], together[i])
            assert [x for x in row if x != MASK] == together[i, : 16 - row.count(MASK)].tolist()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"edit_threshold": 1.1}, r"--edit-threshold must lie in \[0, 1\], got 1.1"),
        ({"edit_threshold": math.nan}, "--edit-threshold must lie in"),
        ({"edit_threshold": 0.5, "edit_steps": -1}, "--edit-steps must be 0 or more, got -1"),
        ({"edit_threshold": 0.5, "block_size": None}, "for models with blocks, and this one reads"),
        ({"edit_threshold": 0.5, "threshold": None}, "--edit-threshold needs a --threshold: add"),
        ({"edit_steps": 4}, "--edit-steps needs an --edit-threshold: add one"),
    ],
)
def test_editing_that_cannot_work(settings, message):
    with pytest.raises(UserError, match=message):
        Decoder(MASK, **{"block_size": 4, "threshold": 0.5, **settings})
