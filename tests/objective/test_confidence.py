"""Entropies and their gradient against float64, whole and with a divided vocabulary."""

import pytest
import torch

from megatron_mdm.objective.confidence import entropy, entropy_gradient

NO_TOKEN = torch.finfo(torch.float64).min  # the logit of a padding row


def logits_of(case):
    logits = torch.randn(40, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    if case == "ties":
        logits = logits.round()
    if case == "certain":
        logits *= 300.0  # most probabilities underflow
    if case == "padding":
        logits[:, -4:] = NO_TOKEN
    return logits


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("case", ["random", "ties", "certain", "padding"])
def test_entropy_and_gradient_are_those_of_the_definition(case, parts):
    logits = logits_of(case).requires_grad_()
    scale = torch.randn(40, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    log_p = logits.log_softmax(dim=-1)
    expected = -torch.where(log_p.exp() > 0, log_p.exp() * log_p, 0.0).sum(dim=-1)
    (gradient,) = torch.autograd.grad((scale * expected).sum(), logits)

    divided = logits.detach().softmax(dim=-1).chunk(parts, dim=-1)
    whole = sum(entropy(p) for p in divided)
    torch.testing.assert_close(whole, expected.detach(), rtol=1e-10, atol=1e-12)
    found = torch.cat([entropy_gradient(p, whole, scale) for p in divided], dim=-1)
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)
    assert found.isfinite().all()
    if case == "padding":
        assert not found[:, -4:].any()
