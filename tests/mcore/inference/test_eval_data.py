"""The texts that the tools measure a checkpoint on: rows, documents, pairs, what is scored."""

from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_mdm.mcore.inference.eval_data import Documents, rows_from_documents, scored_per_byte
from tests import ranks

DIVIDED = "--mdm-isolate-documents --no-mdm-eod-attended --train-iters 8 --save-interval 8".split()


@pytest.fixture(scope="module")
def found(base, data, pairs, tmp_path_factory):
    """A checkpoint whose attention stays in documents and does not see their ends."""
    directory = tmp_path_factory.mktemp("divided")
    checkpoint = str(directory / "checkpoint")
    ranks.launch(directory, 1, *base, *DIVIDED, "--save", checkpoint)
    ranks.launch(directory, 1, "--", checkpoint, str(data), str(pairs), entry="measured_texts")
    return torch.load(directory / "texts.pt", weights_only=False)


def test_rows_are_scored_as_the_validation_of_the_run_does(found):
    """Documents that do not see each other stay apart, also where their ends are masked."""
    assert found["evaluated"].shape == (32,)
    torch.testing.assert_close(found["evaluated"], found["validated"], rtol=1e-5, atol=1e-4)
    assert (found["not divided"] - found["validated"]).abs().max() > 0.1


def test_other_weights_of_the_same_network_load_beside_it(found):
    assert torch.equal(*found["logits"])
    assert "is of another network: --swiglu is True in the checkpoint and False" in found["refused"]


def test_pairs_are_rows_whose_prompts_are_seen(found):
    """Responses to the end of the row, as they are trained on without eligible padding."""
    expected = ranks.random_pairs(120)
    assert len(found["pairs"]) == len(expected)
    rows = {tuple(text.tokens.tolist()): text for text in found["pairs"]}
    for prompt, response in expected:
        length = len(prompt) + len(response)
        text = rows[(*prompt, *response, *[ranks.EOD_ID] * (32 - length))]
        assert text.eligible.tolist() == [len(prompt) <= i < length for i in range(32)]
        assert text.documents is None


def test_packed_pairs_stay_apart(found):
    """Fewer rows than pairs, with the same tokens to predict, in documents of their own."""
    texts = found["packed pairs"]
    assert len(texts) < 120
    responses = sum(len(response) for _, response in ranks.random_pairs(120))
    assert sum(int(text.eligible.sum()) for text in texts) == responses
    for text in texts:
        parts = [text.tokens[text.documents == d] for d in text.documents.unique()]
        able = [text.eligible[text.documents == d] for d in text.documents.unique()]
        for tokens, eligible in zip(parts, able, strict=True):
            if eligible.any():  # else the padding
                assert (tokens >= 50).tolist() == eligible.tolist()


@pytest.mark.parametrize(("eod_eligible", "tokens"), [(True, 5), (False, 3)])
def test_bits_per_byte_count_what_is_scored(eod_eligible, tokens):
    """Two documents, `ab` + `cde`, as three tokens and two ends, of 5 bytes."""
    args = Namespace(mdm_eod_eligible=eod_eligible, mdm_shift=False, seq_length=2)
    loaded = SimpleNamespace(args=args, tokenizer=SimpleNamespace(eod=9))
    documents = Documents([np.array([1, 2, 9]), np.array([3, 9])], num_bytes=5)
    rows = rows_from_documents(loaded, documents, packed=True)
    assert [row.tokens.tolist() for row in rows] == [[1, 2], [9, 3], [9]]
    assert [row.origin.tolist() for row in rows] == [[0, 0], [0, 1], [1]]
    assert scored_per_byte(loaded, rows, documents) == tokens / 5
    assert scored_per_byte(loaded, rows, Documents(documents.ids, None)) is None


@pytest.mark.parametrize("packed", [True, False])
def test_a_shifted_model_scores_every_token_after_another(packed):
    args = Namespace(mdm_shift=True, seq_length=3)
    loaded = SimpleNamespace(args=args, tokenizer=SimpleNamespace(eod=9), opening_token_id=9)
    documents = Documents([np.array([1, 2, 3, 9]), np.array([4, 9])], num_bytes=5)
    rows = rows_from_documents(loaded, documents, packed)
    expected = [[9, 1, 2], [2, 3, 9], [9, 4, 9]]  # a document begins after the end of another
    assert [row.tokens.tolist() for row in rows] == expected
    assert [row.origin.tolist()[1:] for row in rows] == [[0, 0], [0, 0], [1, 1]]
    scored = [token for row in rows for token in row.tokens[row.eligible].tolist()]
    assert scored == [1, 2, 3, 9, 4, 9]
    assert scored_per_byte(loaded, rows, documents) == 6 / 5
    # Without a token to begin after, the first ones have bytes and no score.
    loaded.opening_token_id = None
    rows = rows_from_documents(loaded, documents, packed)
    assert next(row.tokens.tolist() for row in rows) == [1, 2, 3]
    assert scored_per_byte(loaded, rows, documents) is None
