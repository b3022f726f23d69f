"""The texts on which tools measure a checkpoint: rows, documents, pairs, scored tokens."""

import dataclasses
import os
import sys
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_mdm.checkpoint import open_checkpoint
from megatron_mdm.config import MDMConfig
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.inference.eval_data import Documents, rows_from_documents, scored_per_byte
from tests import ranks

DIVIDED = "--mdm-isolate-documents --no-mdm-eod-attended --train-iters 8 --save-interval 8".split()


def measured_texts() -> None:
    """Saves the texts on which tools measure a checkpoint, with losses and logits."""
    load, text, pairs = sys.argv[sys.argv.index("--") + 1 :]
    with open_checkpoint(load, "cpu") as loaded:
        from megatron_mdm.mcore.inference.eval_data import (
            read_tokens,
            rows_from_documents,
            rows_from_pairs,
        )
        from megatron_mdm.mcore.inference.loaded_model import load_other_weights

        rows = rows_from_documents(
            loaded, read_tokens(loaded, text, "text", 8 * 32, seed=0), packed=True
        )[:8]
        found = {"evaluated": _evaluated(loaded, rows), "validated": _validated(loaded, rows)}
        one = [dataclasses.replace(row, documents=None) for row in rows]
        found["not divided"] = _evaluated(loaded, one)
        twin = load_other_weights(loaded, load)
        assert twin.model is not loaded.model and loaded.args.load == load
        found["logits"] = [x.logits(rows[0].tokens[None]) for x in (loaded, twin)]
        loaded.args.swiglu = False
        try:
            load_other_weights(loaded, load)
        except UserError as error:
            found["refused"] = str(error)
        for packed, name in ((False, "pairs"), (True, "packed pairs")):
            settings = {"mdm_isolate_documents": packed, "mdm_eod_attended": True}
            args = Namespace(**{**vars(loaded.args), **settings})
            found[name] = rows_from_pairs(dataclasses.replace(loaded, args=args), pairs, 200)
        torch.save(found, f"{os.environ['TRACE_DIR']}/texts.pt")


def _evaluated(loaded, rows) -> torch.Tensor:
    """Nats of rows of 32 tokens, with four draws each."""
    from megatron_mdm.evaluation.nelbo import draw

    drawn = draw(loaded.logits, rows, 127, 2, 2, 0, np.arange(len(rows)), batch_size=3)
    return torch.from_numpy(drawn.nats.reshape(-1))


def _validated(loaded, rows) -> torch.Tensor:
    """Nats of the same rows with the same masks, computed by the run's own validation."""
    from megatron_mdm.evaluation.nelbo import lattice_quantiles
    from megatron_mdm.mcore.training.forward_step import forward_step
    from megatron_mdm.mcore.training.state import TrainingState
    from megatron_mdm.objective.randomness import Split, row_uniforms

    loaded.args.eval_micro_batch_size = 1
    loaded.args.check_for_nan_in_loss_and_grad = False  # it works only inside a step
    loaded.args.mdm_sampler_state_in_checkpoint = loaded.args.mdm_log_state_in_checkpoint = False
    state = TrainingState(loaded.args, loaded.tokenizer.eod)
    sums = []
    for job, quantile in enumerate(lattice_quantiles(np.arange(len(rows)), 2, 2, 0).reshape(-1)):
        numbers = {"num_tokens": 32, "length": 32, "split": 1, "row": job, "quantile": quantile}
        row = {name: torch.tensor([int(value)]) for name, value in numbers.items()}
        row["text"] = row["row"] // 4
        row["tokens"] = rows[job // 4].tokens[None]
        row["uniforms"] = torch.from_numpy(row_uniforms(0, Split.TEST, job, 32))[None]
        with torch.no_grad():
            output, loss = forward_step(state, iter([row]), loaded.model)
            sums.append(loss(output)[0].double())
    return torch.stack(sums)


@pytest.fixture(scope="module")
def found(base, data, pairs, tmp_path_factory):
    """Results of a checkpoint whose attention stays in documents and does not see their ends."""
    directory = tmp_path_factory.mktemp("divided")
    checkpoint = str(directory / "checkpoint")
    ranks.launch(directory, 1, *base, *DIVIDED, "--save", checkpoint)
    ranks.launch(directory, 1, "--", checkpoint, str(data), str(pairs), entry=measured_texts)
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
    """The response alone is eligible, as in training without eligible padding."""
    expected = ranks.random_pairs(120)
    assert len(found["pairs"]) == len(expected)
    rows = {tuple(text.tokens.tolist()): text for text in found["pairs"]}
    for prompt, response in expected:
        length = len(prompt) + len(response)
        text = rows[(*prompt, *response, *[ranks.EOD_ID] * (32 - length))]
        assert text.eligible.tolist() == [len(prompt) <= i < length for i in range(32)]
        assert text.documents is None


def test_packed_pairs_stay_apart(found):
    """They fill fewer rows, with the same tokens to predict, and each is a document."""
    texts = found["packed pairs"]
    assert len(texts) < 120
    responses = sum(len(response) for _, response in ranks.random_pairs(120))
    assert sum(int(text.eligible.sum()) for text in texts) == responses
    for text in texts:
        parts = [text.tokens[text.documents == d] for d in text.documents.unique()]
        able = [text.eligible[text.documents == d] for d in text.documents.unique()]
        for tokens, eligible in zip(parts, able, strict=True):
            if eligible.any():  # otherwise it is the padding
                assert (tokens >= 50).tolist() == eligible.tolist()


@pytest.mark.parametrize(("eod_eligible", "tokens"), [(True, 5), (False, 3)])
def test_bits_per_byte_count_what_is_scored(eod_eligible, tokens):
    """Two documents of 5 bytes in all, `ab` and `cde`, are three tokens and two ends."""
    loaded = SimpleNamespace(
        mdm=MDMConfig(eod_eligible=eod_eligible),
        args=Namespace(seq_length=2),
        tokenizer=SimpleNamespace(eod=9),
    )
    documents = Documents([np.array([1, 2, 9]), np.array([3, 9])], num_bytes=5)
    rows = rows_from_documents(loaded, documents, packed=True)
    assert [row.tokens.tolist() for row in rows] == [[1, 2], [9, 3], [9]]
    assert [row.origin.tolist() for row in rows] == [[0, 0], [0, 1], [1]]
    assert scored_per_byte(loaded, rows, documents) == tokens / 5
    assert scored_per_byte(loaded, rows, Documents(documents.ids, None)) is None


@pytest.mark.parametrize("packed", [True, False])
def test_a_shifted_model_scores_every_token_after_another(packed):
    loaded = SimpleNamespace(
        mdm=MDMConfig(shift=True),
        args=Namespace(seq_length=3),
        tokenizer=SimpleNamespace(eod=9),
        opening_token_id=9,
    )
    documents = Documents([np.array([1, 2, 3, 9]), np.array([4, 9])], num_bytes=5)
    rows = rows_from_documents(loaded, documents, packed)
    expected = [[9, 1, 2], [2, 3, 9], [9, 4, 9]]  # a document begins after the end of another
    assert [row.tokens.tolist() for row in rows] == expected
    assert [row.origin.tolist()[1:] for row in rows] == [[0, 0], [0, 0], [1, 1]]
    scored = [token for row in rows for token in row.tokens[row.eligible].tolist()]
    assert scored == [1, 2, 3, 9, 4, 9]
    assert scored_per_byte(loaded, rows, documents) == 6 / 5
    # Without an opening token, the first tokens have bytes but no score.
    loaded.opening_token_id = None
    rows = rows_from_documents(loaded, documents, packed)
    assert next(row.tokens.tolist() for row in rows) == [1, 2, 3]
    assert scored_per_byte(loaded, rows, documents) is None
