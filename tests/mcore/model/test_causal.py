"""The network of masked diffusion, used as an autoregressive model."""

import argparse
import dataclasses
import os
import re
import runpy
import signal
import sys
import threading
import time

import pytest
import torch
from megatron.training import get_args, global_vars

from megatron_mdm.checkpoint import open_checkpoint
from megatron_mdm.config import MDMConfig
from megatron_mdm.interruption import INTERRUPTED
from megatron_mdm.mcore.checkpoint.files import find_checkpoint
from megatron_mdm.mcore.model.attention_mask import attention_mask_argument
from tests import ranks

SFT = "--mdm-sft --mdm-shift --mdm-normalization rows --eval-iters 3 --eval-interval 1".split()
BATCH = "--eval-global-batch-size 4 --eval-micro-batch-size 4 --train-iters 1 --lr 0".split()


def autoregressive() -> None:
    """Runs the autoregressive program, as a user starts it."""
    runpy.run_module("megatron_mdm.experiments.autoregressive", run_name="__main__")


def interrupted() -> None:
    """Runs the program and sends it a signal once it has trained for two iterations."""

    def interrupt():
        while global_vars._GLOBAL_ARGS is None or getattr(get_args(), "curr_iteration", 0) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    autoregressive()


def causal() -> None:
    """Saves logits, losses and gradients of a checkpoint under a causal mask."""
    (load,) = sys.argv[sys.argv.index("--") + 1 :]
    with open_checkpoint(load, "cpu") as loaded:
        from megatron_mdm.evaluation.nelbo import ScoredRow
        from megatron_mdm.mcore.inference.measure import ParallelSketch, causal_step
        from megatron_mdm.mcore.model.causal import causal_attention

        tokens = torch.randint(0, 119, (3, 32), generator=torch.Generator().manual_seed(0))
        other = tokens.clone()
        other[:, 20:] = 7
        with causal_attention(loaded.model):
            seen, unseen = loaded.logits(tokens), loaded.logits(other)
        parameters = list(loaded.model.parameters())
        step = causal_step(loaded, ParallelSketch(parameters, None))
        steps = [step(ScoredRow(row, torch.ones_like(row, dtype=torch.bool))) for row in tokens]
        loss, gradient = (sum(x) / 3 for x in zip(*steps, strict=True))
        # Predicts each token from its own prefix alone, in which no later token can be seen.
        with causal_attention(loaded.model):
            terms = [
                torch.nn.functional.cross_entropy(
                    loaded.model(tokens[:, :i], torch.arange(i).expand(3, i), None)[:, -1],
                    tokens[:, i],
                )
                for i in range(1, 32)
            ]
        expected = torch.stack(terms).mean()
        found = torch.autograd.grad(expected, parameters)
        whole = torch.cat([g.flatten() for g in found])
        torch.save(
            {
                "causal": (seen, unseen),
                "full": (loaded.logits(tokens), loaded.logits(other)),
                "step": (loss, gradient),
                "expected": (float(expected), whole),
                "responses": _response_losses(loaded),
                "hidden ends": _with_hidden_ends(loaded, tokens, other),
            },
            f"{os.environ['TRACE_DIR']}/causal.pt",
        )


def _with_hidden_ends(loaded, tokens, other):
    """Results for rows that begin with an end of document, which the model hides from attention.

    Returns:
        Logits of both batches, by whether attention is causal; and the causal losses of the first
        row, with and without the setting.
    """
    from megatron_mdm.evaluation.nelbo import ScoredRow
    from megatron_mdm.mcore.inference.measure import ParallelSketch, causal_step

    tokens, other = tokens.clone(), other.clone()
    tokens[:, 0] = other[:, 0] = loaded.tokenizer.eod
    args = argparse.Namespace(**{**vars(loaded.args), "mdm_eod_attended": False})
    hiding = dataclasses.replace(loaded, args=args)
    assert loaded.mdm.eod_attended and not hiding.mdm.eod_attended
    logits = {
        causal: [hiding.logits(rows, causal=causal) for rows in (tokens, other)]
        for causal in (True, False)
    }
    sketch = ParallelSketch(list(loaded.model.parameters()), 8)
    row = ScoredRow(tokens[0], torch.ones_like(tokens[0], dtype=torch.bool))
    return logits, [causal_step(model, sketch)(row)[0] for model in (hiding, loaded)]


def _response_losses(loaded) -> float:
    """Mean over the last 12 of `ranks.random_pairs(120)` of the response's mean loss."""
    from megatron_mdm.mcore.model.causal import causal_attention
    from tests import ranks

    losses = []
    for prompt, response in ranks.random_pairs(120)[108:]:
        tokens = torch.tensor([prompt + response])
        with causal_attention(loaded.model):
            log_p = loaded.logits(tokens)[0].log_softmax(dim=-1)
        first = max(len(prompt), 1)
        losses.append(
            -log_p[torch.arange(first - 1, tokens.shape[1] - 1), tokens[0, first:]].mean()
        )
    return float(torch.stack(losses).mean())


@pytest.fixture(scope="module")
def found(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("causal")
    load = base[base.index("--load") + 1]
    ranks.launch(directory, 1, "--", load, entry=causal)
    return torch.load(directory / "causal.pt")


def test_no_position_sees_a_later_one_and_afterwards_all_do(found):
    for kind, equal in (("causal", True), ("full", False)):
        a, b = found[kind]
        assert torch.equal(a[:, :20], b[:, :20]) == equal
        assert not torch.allclose(a[:, 20:], b[:, 20:])


def test_the_first_position_sees_none_after_it_where_ends_are_hidden(found):
    """It may attend to itself alone, and the flag would hide even that."""
    logits, losses = found["hidden ends"]
    for causal, equal in ((True, True), (False, False)):
        a, b = logits[causal]
        # Logits of an autoregressive model at position i predict token i from the tokens before it.
        assert torch.equal(a[:, :21], b[:, :21]) == equal
        assert not torch.allclose(a[:, 21:], b[:, 21:])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("segments", [None, [[0, 0, 1, 1]]])
@pytest.mark.parametrize("hidden", ["eod_attended", "pad_attended"])
def test_a_causal_mask_hides_no_position_from_itself(hidden, segments):
    rows, padding = torch.tensor([[9, 1, 9, 9]]), torch.tensor([[False, False, False, True]])
    segments = None if segments is None else torch.tensor(segments)
    mask = attention_mask_argument(
        rows, padding, 9, MDMConfig(**{hidden: False}), segments, "local", causal=True
    )
    if segments is None:
        assert mask is None  # Megatron's layers make the mask
    else:
        seen = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
        assert torch.equal(~mask[0, 0], torch.tensor(seen).bool())


def test_loss_and_gradient_are_those_of_prefixes(found):
    (loss, gradient), (expected, expected_gradient) = found["step"], found["expected"]
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


def test_the_program_trains_on_responses_given_all_before(found, base, pairs, tmp_path):
    """Validation takes each of the 12 pairs once, padded to the row's length."""
    flags = [*base, "--data-path", str(pairs), *SFT, *BATCH]
    run = ranks.launch(tmp_path, 1, *flags, entry=autoregressive)
    (value,) = set(re.findall(r"validation set \| lm loss value: ([\d.E+-]+)", run.output[0]))
    assert float(value) == pytest.approx(found["responses"], rel=1e-5)
    assert run.scalars["lm loss"][0] == pytest.approx(float(value), rel=0.3)


def test_a_signal_has_the_program_save_and_leave(base, pairs, tmp_path):
    save = tmp_path / "checkpoint"
    flags = [*base, "--data-path", str(pairs), *SFT, *BATCH, "--train-iters", "100000"]
    flags += ["--eval-interval", "100000", "--save", str(save), "--save-interval", "100000"]
    run = ranks.launch(tmp_path / "run", 1, *flags, entry=interrupted, check=False)
    assert run.status == [INTERRUPTED], run.output
    assert "SIGTERM: the run ends after this iteration" in run.output[0]
    assert 2 <= find_checkpoint(str(save)).iteration < 100_000


def test_bad_input_is_one_line(base, tmp_path):
    run = ranks.launch(tmp_path, 1, *base, entry=autoregressive, check=False)
    assert run.status == [2]
    assert "error: --mdm-shift is missing" in run.output[0]
