"""The adapter, by itself and inside lm-evaluation-harness where that is installed."""

import json
from types import SimpleNamespace

import pytest
import torch

from megatron_mdm.errors import UserError
from megatron_mdm.harness import HarnessModel

LETTERS = "abcdefgh "
MASK = len(LETTERS)


def logits(tokens):
    """Wants the letter after the one before, whatever else is seen; surer of what it sees."""
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


def test_a_space_belongs_to_the_continuation_and_contexts_are_cut_on_the_left(model):
    assert model._pair("ab ", "c") == ([0, 1], [8, 2])
    assert model._pair("abcdefgh", "abc") == (encode("defgh"), encode("abc"))
    assert model._pair("", "abc") == ([], encode("abc"))
    with pytest.raises(UserError, match="9 tokens and a row of the model has room for 8"):
        model._pair("a", "abcdefgha")


def merging(text):
    """Ids of the longest of these, as BPE and unigram models merge letters over any border."""
    pieces, ids = [*LETTERS, "ab", "bc", "c "], []
    while text:
        piece = max((p for p in pieces if text.startswith(p)), key=len)
        text = text[len(piece) :]
        ids.append(pieces.index(piece))
    return ids


def test_tokens_of_context_and_continuation_belong_to_the_continuation():
    """Whatever the border, context and continuation are the tokens of the whole text."""
    ab, bc = 9, 10
    size = 12
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
    # One token of 13 that are equally likely; an answer is certain only if it has no token.
    (bound, _), (other, _) = model.loglikelihood([request("a", "b"), request("a", "c")])
    assert bound == other == pytest.approx(-torch.log(torch.tensor(13.0)).item())
    for context, continuation in (("ab", ""), ("ab ", ""), ("", "")):
        with pytest.raises(UserError, match="has no tokens of its own"):
            model.loglikelihood([request(context, continuation)])


def test_whole_texts_are_the_sum_over_rows(model):
    text = "abcdefgh" * 2 + "a"
    (whole,) = model.loglikelihood_rolling([request(text)])
    parts = [model.loglikelihood([request("", t)])[0][0] for t in ("abcdefgh", "a")]
    assert whole == pytest.approx(2 * parts[0] + parts[1], rel=0.3)


PERIOD = 5  # of the letters of the oracle's language
END = MASK + 1


def oracle(shift):
    """A model that is always right about texts of letters that go round: abcdeabc and so on.

    A text begins with any letter in sight of the others, and with an `a` after the end of document
    or where nothing is seen. The logits of a shifted model are right wherever a token stands
    before; those of the first position are of the token after it, and surely wrong.
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
    """Also of the first one of a text and of each row, whatever predicts it."""
    settings = {"shift": True, "opening_token_id": END} if shift else {}
    model = HarnessModel(oracle(shift), encode, MASK, max_length=10, draws=8, **settings)
    requests = [("abcde", "ab"), ("", "a"), ("", "abcdeabc"), ("abcdeabcde", "abcde")]
    for bound, greedy in model.loglikelihood([request(*texts) for texts in requests]):
        assert bound == pytest.approx(0.0, abs=1e-20) and greedy
    # Rows of 10 unshifted, of 9 new ones shifted.
    for length in (1, 9, 10, 11, 18, 19, 20, 45):
        (whole,) = model.loglikelihood_rolling([request(("abcde" * 9)[:length])])
        assert whole == pytest.approx(0.0, abs=1e-20), length
    assert model.loglikelihood_rolling([request("")]) == [0]


def test_the_first_token_of_a_shifted_model_has_to_be_predicted_from_another():
    def seen_rows(tokens):
        assert (tokens[:, 0] != MASK).all()
        return oracle(True)(tokens)

    model = HarnessModel(seen_rows, encode, MASK, 4, draws=4, shift=True, opening_token_id=END)
    assert model._pair("", "abc") == ([END], encode("abc"))
    assert model._pair("ab", "cde") == (encode("b"), encode("cde"))
    model.loglikelihood_rolling([request("abcdeabcde")])
    with pytest.raises(UserError, match="4 tokens and a row of the model has room for 3"):
        model._pair("ab", "cdea")
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


def test_generation_is_refused_in_one_line(model):
    with pytest.raises(UserError, match="multiple-choice"):
        model.generate_until([])


def test_a_local_task_in_the_harness(model, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: [eval]")
    questions = [
        {"start": LETTERS[i : i + 2], "answers": [LETTERS[i + 2], LETTERS[i]], "gold": 0}
        for i in range(5)
    ]
    questions.append({"start": "ab", "answers": ["c", "d"], "gold": 1})  # it gets this one wrong
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    task = {
        "task": "next_letter",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{start}}",
        "doc_to_target": "gold",
        "doc_to_choice": "answers",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    results = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)
    assert results["results"]["next_letter"]["acc,none"] == pytest.approx(5 / 6)
