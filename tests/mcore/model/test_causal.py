"""The network of masked diffusion as an autoregressive model."""

import re

import pytest
import torch

from tests import ranks

SFT = "--mdm-sft --mdm-shift --mdm-normalization rows --eval-iters 3 --eval-interval 1".split()
BATCH = "--eval-global-batch-size 4 --eval-micro-batch-size 4 --train-iters 1 --lr 0".split()


@pytest.fixture(scope="module")
def found(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("causal")
    load = base[base.index("--load") + 1]
    ranks.launch(directory, 1, "--", load, entry="causal")
    return torch.load(directory / "causal.pt")


def test_no_position_sees_a_later_one_and_afterwards_all_do(found):
    for kind, equal in (("causal", True), ("full", False)):
        a, b = found[kind]
        assert torch.equal(a[:, :20], b[:, :20]) == equal
        assert not torch.allclose(a[:, 20:], b[:, 20:])


def test_loss_and_gradient_are_those_of_prefixes(found):
    (loss, gradient), (expected, expected_gradient) = found["step"], found["expected"]
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


def test_the_program_trains_on_responses_given_all_before(found, base, pairs, tmp_path):
    """Its validation takes each of the 12 pairs once, padded to the row."""
    flags = [*base, "--data-path", str(pairs), *SFT, *BATCH]
    run = ranks.launch(tmp_path, 1, *flags, entry="autoregressive")
    (value,) = set(re.findall(r"validation set \| lm loss value: ([\d.E+-]+)", run.output[0]))
    assert float(value) == pytest.approx(found["responses"], rel=1e-5)
    assert run.scalars["lm loss"][0] == pytest.approx(float(value), rel=0.3)


def test_bad_input_is_one_line(base, tmp_path):
    run = ranks.launch(tmp_path, 1, *base, entry="autoregressive", check=False)
    assert run.status == [2]
    assert "error: --mdm-shift is missing" in run.output[0]
