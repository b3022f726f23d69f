"""The adapter alone; tests/lm_eval/test_lm_eval.py tests it inside lm-evaluation-harness."""

from types import SimpleNamespace

import pytest
import torch

from megatron_mdm.errors import UserError
from megatron_mdm.generation.decoder import Decoder
from megatron_mdm.lm_eval.harness import HarnessModel

LETTERS = "abcdefgh 0"
MASK = len(LETTERS)


def logits(tokens):
    """Prefers the letter after the previous one; has no preference if it does not see that one."""
    before = torch.roll(tokens, 1, dims=1)
    scores = torch.zeros(*tokens.shape, MASK + 1, dtype=torch.float64)
    known = (before < 8)[..., None]
    wanted = torch.nn.functional.one_hot((before + 1) % 8, MASK + 1)
    return scores + torch.where(known, 3.0 * wanted, 0.0)


def encode(text):
    return [LETTERS.index(letter) for letter in text]


@pytest.fixture
def model():
    return HarnessModel(logits, encode, MASK, max_length=8, draws=16)


def request(*args):
    return SimpleNamespace(args=args)


def test_likelier_continuations_score_higher(model):
    (right, greedy), (wrong, other) = model.loglikelihood(
        [request("ab", "cd"), request("ab", "ga")]
    )
    assert right > wrong
    assert (greedy, other) == (True, False)
    ((one, _),) = model.loglikelihood([request("ab", "c")])
    assert one == pytest.approx(-torch.log(1 + MASK * torch.exp(torch.tensor(-3.0))).item())


def test_a_space_belongs_to_the_continuation_and_contexts_are_cut_on_the_left(model, caplog):
    assert model._pair("ab ", "c") == ([0, 1], [8, 2])
    assert model._pair("", "abc") == ([], encode("abc"))
    pairs = [model._pair("ab", "c"), model._pair("abcdefgh", "abc")]
    assert model._fitted(pairs) == [pairs[0], (encode("defgh"), encode("abc"))]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("1 of 2 contexts were longer than the model's rows of 8 tokens")
    with pytest.raises(UserError, match="9 tokens and a row of the model has room for 8"):
        model.loglikelihood([request("a", "abcdefgha")])


def merging(text):
    """Greedy ids of the longest pieces: like BPE, it merges letters across any border."""
    pieces, ids = [*LETTERS, "ab", "bc", "c "], []
    while text:
        piece = max((p for p in pieces if text.startswith(p)), key=len)
        text = text[len(piece) :]
        ids.append(pieces.index(piece))
    return ids


def test_tokens_of_context_and_continuation_belong_to_the_continuation():
    """Wherever the border is, context and continuation have the tokens of the whole text."""
    ab, bc = 10, 11
    size = 13
    model = HarnessModel(
        lambda tokens: torch.zeros(*tokens.shape, size + 1, dtype=torch.float64),
        merging,
        size,
        max_length=8,
        draws=8,
    )
    assert model._pair("a", "b") == ([], [ab])
    assert model._pair("a", "c") == ([0], [2])
    assert model._pair("ca", "bb") == ([2], [ab, 1])  # no letter is lost
    assert model._pair("da", "bcb") == ([3], [ab, 2, 1])
    assert model._pair("db", "ca") == ([3], [bc, 0])
    # One of 14 equally likely tokens. An answer could be certain only if it had no token.
    (bound, _), (other, _) = model.loglikelihood([request("a", "b"), request("a", "c")])
    assert bound == other == pytest.approx(-torch.log(torch.tensor(14.0)).item())
    for context, continuation in (("ab", ""), ("ab ", ""), ("", "")):
        with pytest.raises(UserError, match="has no tokens of its own"):
            model.loglikelihood([request(context, continuation)])


def test_whole_texts_are_the_sum_over_rows(model):
    text = "abcdefgh" * 2 + "a"
    (whole,) = model.loglikelihood_rolling([request(text)])
    parts = [model.loglikelihood([request("", t)])[0][0] for t in ("abcdefgh", "a")]
    assert whole == pytest.approx(2 * parts[0] + parts[1], rel=0.3)


PERIOD = 5  # number of letters in the oracle's language
END = MASK + 1


def oracle(shift):
    """A model that is always right about texts of letters in a cycle: abcdeabc and so on.

    If it sees letters, a text continues them in both directions. If it sees none, a text begins
    with `a`, also after the end of document. The logits of a shifted model are right wherever a
    token stands before. Its logits at the first position are for the token after it, and wrong for
    the first token.
    """

    def logits(tokens):
        scores = torch.zeros(*tokens.shape, END + 1, dtype=torch.float64)
        for row, wanted in zip(tokens.tolist(), scores, strict=True):
            start = int(row[0] == END)
            seen = [(i, token) for i, token in enumerate(row) if token < PERIOD]
            phase = seen[0][1] - seen[0][0] if seen else -start
            for i in range(len(row)):
                wanted[i, (i + phase + (shift and i == 0)) % PERIOD] = 60.0
        return scores

    return logits


@pytest.mark.parametrize("shift", [False, True])
def test_a_perfect_model_is_sure_of_every_token(shift):
    """This includes the first token of a text and of each row, whatever predicts it."""
    settings = {"shift": True, "opening_token_id": END} if shift else {}
    model = HarnessModel(oracle(shift), encode, MASK, max_length=10, draws=8, **settings)
    requests = [("abcde", "ab"), ("", "a"), ("", "abcdeabc"), ("abcdeabcde", "abcde")]
    for bound, greedy in model.loglikelihood([request(*texts) for texts in requests]):
        assert bound == pytest.approx(0.0, abs=1e-20) and greedy
    # Rows have 10 tokens, or 9 new tokens if the model is shifted.
    for length in (1, 9, 10, 11, 18, 19, 20, 45):
        (whole,) = model.loglikelihood_rolling([request(("abcde" * 9)[:length])])
        assert whole == pytest.approx(0.0, abs=1e-20), length
    assert model.loglikelihood_rolling([request("")]) == [0]


def test_the_first_token_of_a_shifted_model_has_to_be_predicted_from_another():
    def seen_rows(tokens):
        assert (tokens[:, 0] != MASK).all()
        return oracle(True)(tokens)

    model = HarnessModel(seen_rows, encode, MASK, 4, draws=4, shift=True, opening_token_id=END)
    fitted = model._fitted([model._pair("", "abc"), model._pair("ab", "cde")])
    assert fitted == [([END], encode("abc")), (encode("b"), encode("cde"))]
    model.loglikelihood_rolling([request("abcdeabcde")])
    with pytest.raises(UserError, match="4 tokens and a row of the model has room for 3"):
        model.loglikelihood([request("ab", "cdea")])
    without = HarnessModel(oracle(True), encode, MASK, 4, draws=4, shift=True)
    assert without.loglikelihood([request("a", "bcd")])[0][1]
    for ask in (
        lambda: without.loglikelihood([request("", "a")]),
        lambda: without.loglikelihood_rolling([request("ab")]),
    ):
        with pytest.raises(UserError, match="cannot score the first token .* choose tasks"):
            ask()
    with pytest.raises(UserError, match="max_length 1: rows have no room"):
        HarnessModel(oracle(True), encode, MASK, 1, shift=True, opening_token_id=END)


def test_rows_of_whole_texts_have_masks_of_their_own(model):
    """Two equal texts are two draws."""
    one, other = model.loglikelihood_rolling([request("abcdefgh"), request("abcdefgh")])
    assert one != other and one == pytest.approx(other, rel=0.2)


def writer(**settings):
    """A model that writes the letters that follow, as `logits` prefers."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: [eval]")
    decoder = Decoder(MASK, block_length=1, vocab_size=MASK, end_token_ids=(encode("h")[0],))
    settings = {"max_length": 12, "decoder": decoder, "decode": decode, **settings}
    return HarnessModel(logits, encode, MASK, **settings)


def decode(ids):
    return "".join(LETTERS[i] for i in ids)


def test_texts_end_at_a_token_or_a_string(caplog):
    """A text ends at the first of them. Settings that the task does not give are the model's."""
    model = writer(max_gen_toks=5)
    asked = [
        request("ab", {"until": []}),
        request("ab", {"until": ["g", "ef", "ff"], "max_gen_toks": 8}),
        request("ef", {"until": "", "max_gen_toks": 4}),  # up to the model's end token
        request("", {"until": ["zz"], "max_gen_toks": 1}),
        request("ab", {"until": ["e"], "max_new_tokens": 2}),
    ]
    texts = model.generate_until(asked)
    assert (texts[:3], len(texts[3]), texts[4]) == (["cdefg", "cd", "g"], 1, "cd")
    assert writer(max_gen_toks=5, batch_size=1).generate_until(asked) == texts
    assert not caplog.records
    assert model.generate_until([request("gabcdefgabcde", {"max_gen_toks": 2})]) == ["fg"]
    assert "1 of 1 contexts were longer" in caplog.records[0].getMessage()


def test_a_task_says_how_texts_are_written(monkeypatch):
    """A task's settings override the model's. A text depends on its place, not on other texts."""
    used, call = [], Decoder.__call__

    def recording(self, *args):
        used.append(self)
        return call(self, *args)

    monkeypatch.setattr(Decoder, "__call__", recording)
    model = writer(decoder=Decoder(MASK, steps=7, threshold=0.9))
    greedy = {"do_sample": False, "temperature": 0.8, "max_gen_toks": 4, "steps": "2"}
    sampled = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 4, "block_length": 2}
    alone = {"do_sample": True, "temperature": None, "max_gen_toks": 4.0, "steps": 3}
    asked = [greedy, {**sampled, "threshold": 0.5}, alone]
    model.generate_until([request("ab", settings) for settings in asked])
    own = [(d.steps, d.block_length, d.temperature, d.threshold) for d in used]
    assert own == [(2, None, 0.0, 0.9), (7, 2, 3.0, 0.5), (3, None, 1.0, 0.9)]
    asked = [request("ab", sampled) for _ in range(6)]
    texts = model.generate_until(asked)
    assert len(set(texts)) > 2
    assert texts == writer(decoder=Decoder(MASK, steps=7, threshold=0.9)).generate_until(asked)
    alone = writer(decoder=Decoder(MASK, steps=7, threshold=0.9), batch_size=1)
    assert texts == alone.generate_until(asked)
    other = writer(decoder=Decoder(MASK, steps=7, threshold=0.9), seed=1)
    assert texts != other.generate_until(asked)
    editing = {"max_gen_toks": 4, "threshold": "0.9", "edit_threshold": "0.5", "edit_steps": "2"}
    with pytest.raises(UserError, match="edit_threshold is for models with blocks"):
        model.generate_until([request("ab", editing)])


def test_a_model_with_blocks_gets_the_tokens_of_blocks():
    """Likelihoods come from whole rows and their clean tokens, texts and greediness from blocks."""
    lengths = []

    def in_context(tokens, clean, documents):
        assert not documents.any() and not (clean == MASK).any()
        return logits(tokens)

    def decoded(length):
        def of_last_block(tokens):
            lengths.append((length, tokens.shape[1]))
            return logits(tokens)[:, (tokens.shape[1] - 1) // 4 * 4 :]

        return of_last_block

    decoder = Decoder(MASK, block_size=4, vocab_size=MASK)
    model = HarnessModel(
        in_context, encode, MASK, 12, draws=16, decode=decode, decoder=decoder, decoded=decoded
    )
    (right, greedy), (wrong, other) = model.loglikelihood(
        [request("ab", "cde"), request("ab", "gad")]
    )
    assert right > wrong and (greedy, other) == (True, False)
    assert {length for length, _ in lengths} == {5} and {end for _, end in lengths} == {4, 5}
    lengths.clear()
    assert model.generate_until([request("ab", {"max_gen_toks": 6, "until": []})]) == ["cdefgh"]
    assert set(lengths) == {(8, 4), (8, 8)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_p": 0.05, "temperature": 0.2}, "has min_p 0.05.* add --gen-kwargs min_p=0"),
        ({"top_p": 1.5, "temperature": 0.2}, r"are not valid: top_p must lie in \(0, 1\], got 1.5"),
        ({"top_k": 0.5, "temperature": 0.2}, "cannot be read: 0.5 is no whole number"),
        ({"num_beams": 4}, "generation_kwargs has num_beams 4, .*: choose a task without"),
        ({"max_gen_toks": 12}, "max_gen_toks 12 must be 1 to 11"),
        ({"max_gen_toks": 0}, "max_gen_toks 0 must be 1 to 11"),
        ({"steps": "few"}, "'steps': 'few'.* cannot be read: invalid literal"),
        ({"temperature": "hot"}, "cannot be read: could not convert"),
        ({"steps": 0}, "'steps': 0.* are not valid: steps must be at least 1, got 0"),
        ({"temperature": -1}, "are not valid: temperature must be 0 or more, got -1"),
        (
            {"steps": 1, "block_length": 2},
            "steps 1 is less than one per block: 2 blocks of block_l",
        ),
        ({"steps": 2.9}, "cannot be read: 2.9 is no whole number"),
        ({"max_gen_toks": 3.5}, "cannot be read: 3.5 is no whole number"),
        ({"do_sample": True, "min_p": 0.9}, "has min_p 0.9, which the decoder does not support"),
        ({"do_sample": "maybe"}, "do_sample maybe is neither true nor false"),
    ],
)
def test_settings_that_cannot_be_had_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        writer().generate_until([request("ab", {"max_gen_toks": 3, **settings})])


def test_settings_that_change_nothing_are_taken():
    neutral = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1, "max_gen_toks": 3}
    greedy = {"do_sample": False, "top_p": 0.9, "top_k": 50, "max_gen_toks": 3}
    asked = [request("ab", neutral), request("ab", greedy)]
    assert writer().generate_until(asked) == ["cde", "cde"]


def test_the_likeliest_tokens_may_be_asked_for():
    sampled = {"do_sample": True, "temperature": 0.5, "top_k": 7, "top_p": 0.5}
    decoder, _, _ = writer()._generation({**sampled, "max_gen_toks": 3})
    assert (decoder.temperature, decoder.top_k, decoder.top_p) == (0.5, 7, 0.5)
    for off in ({"top_k": 0, "top_p": 1}, {"top_k": -1, "top_p": 1.0}, {"do_sample": False}):
        decoder, _, _ = writer()._generation({**sampled, "max_gen_toks": 3, **off})
        assert (decoder.top_k, decoder.top_p) == (None, 1.0)


def test_null_ends_no_text():
    for until in (None, [None, "b"]):
        _, _, ends = writer()._generation({"until": until, "max_gen_toks": 1})
        assert ends == (["b"] if until else [])


def test_requests_that_are_expected_are_checked_before_any_is_answered(caplog):
    """All requests are checked, of every method. A context that is cut is reported once."""
    calls = []

    def counted(tokens):
        calls.append(tokens)
        return logits(tokens)

    pytest.importorskip("lm_eval", reason="lm_eval is not installed: [eval]")
    model = HarnessModel(counted, encode, MASK, max_length=8, draws=4, decode=decode)
    good = SimpleNamespace(request_type="loglikelihood", args=("abcdefgh", "abc"))
    for kind, args, message in (
        ("generate_until", ("ab", {"max_gen_toks": 8}), "max_gen_toks 8 must be 1 to 7"),
        ("generate_until", ("ab", {"max_gen_toks": 2, "num_beams": 4}), "has num_beams 4"),
        ("loglikelihood", ("ab", ""), "no tokens of its own"),
        ("loglikelihood", ("a", "abcdefgha"), "9 tokens and a row of the model has room for 8"),
    ):
        model.expect(lambda a=args, k=kind: [good, SimpleNamespace(request_type=k, args=a)])
        with pytest.raises(UserError, match=message):
            model.loglikelihood([good])
        assert not calls and not caplog.records
    model.expect(lambda: [good, SimpleNamespace(request_type="loglikelihood_rolling", args=("a",))])
    model.loglikelihood([good])
    assert calls and len(caplog.records) == 1


def test_a_text_that_spells_the_mask_token_is_refused():
    model = HarnessModel(logits, lambda _: [0, MASK], MASK, max_length=9, decode=decode)
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: [eval]")
    for ask in (
        lambda: model.generate_until([request("a", {"max_gen_toks": 1})]),
        lambda: model.loglikelihood([request("a", "b")]),
        lambda: model.loglikelihood_rolling([request("a")]),
    ):
        with pytest.raises(UserError, match="spells the mask token 10"):
            ask()
    with pytest.raises(UserError, match="no `decode`"):
        HarnessModel(logits, encode, MASK, max_length=9).generate_until([])


def test_a_shifted_model_writes_after_the_end_of_another_text():
    def decoded(ids):
        return decode(i for i in ids if i < MASK)

    settings = {"shift": True, "opening_token_id": END, "decode": decoded}
    settings["decoder"] = Decoder(MASK, block_length=1, vocab_size=MASK)
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: [eval]")
    model = HarnessModel(oracle(True), encode, MASK, 12, **settings)
    asked = [request("", {"max_gen_toks": 7}), request("bc", {"max_gen_toks": 7})]
    assert model.generate_until(asked) == ["abcdeab", "deabcde"]


def test_conversations_need_a_chat_template(model):
    with pytest.raises(UserError, match="has no chat template: drop --apply-chat-template"):
        model.apply_chat_template([{"role": "user", "content": "a"}])
