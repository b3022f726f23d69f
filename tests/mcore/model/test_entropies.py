"""Cross entropies with Megatron's bits, and entropies of right predictions with their gradient.

Layouts are compared in tests/mcore/training: test_blocks.py, test_context_parallel.py.
"""

import pytest
import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_mdm.mcore.model import entropies
from megatron_mdm.mcore.model.entropies import cross_entropy_and_entropy
from tests.one_rank import on_one_cpu_rank

TOKENS = 90  # of 96 rows of the vocabulary


@pytest.fixture(autouse=True)
def one_rank():
    with on_one_cpu_rank():
        yield


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def rows(request):
    """Logits [s, b, V] with padding rows, and labels [b, s], half of them right, some by a tie."""
    generator = torch.Generator().manual_seed(0)
    logits = 2.0 * torch.randn(24, 3, 96, generator=generator)
    labels = torch.randint(TOKENS, (3, 24), generator=generator)
    best = logits[..., :TOKENS].amax(dim=-1, keepdim=True)
    raised = logits.scatter(2, labels.t()[..., None], best + 1.0)
    logits[::2] = raised[::2]
    tied = logits.scatter(2, labels.t()[..., None], best)
    logits[1::6] = tied[1::6]
    logits[..., TOKENS:] = torch.finfo(request.param).min
    return logits.to(request.param), labels


def plain(logits, labels):
    """Entropies of right predictions by the definition, in float64, float64 [b, s]."""
    logits = logits.double()[..., :TOKENS]
    log_p = logits.log_softmax(dim=-1)
    own = logits.gather(-1, labels.t()[..., None])[..., 0]
    is_right = own == logits.amax(dim=-1)
    return torch.where(is_right, -(log_p.exp() * log_p).sum(dim=-1), 0.0).t()


@pytest.mark.parametrize("chunk", [1, 7 * 96, 2**24])
def test_entropies_and_gradient_are_those_of_the_definition(rows, chunk, monkeypatch):
    monkeypatch.setattr(entropies, "CHUNK", chunk)
    given, labels = rows
    scales = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(1))

    logits = given.clone().requires_grad_()
    ours = cross_entropy_and_entropy(labels, logits * 1)  # the call overwrites its argument
    total = sum((x * scale).sum() for x, scale in zip(ours, scales, strict=True))
    (gradient,) = torch.autograd.grad(total, logits)

    exact = given.double().requires_grad_()
    cross_entropy = torch.nn.functional.cross_entropy(
        exact.flatten(0, 1), labels.t().flatten(), reduction="none"
    )
    expected = plain(exact, labels)
    total = (cross_entropy.view(24, 3).t() * scales[0]).sum() + (expected * scales[1]).sum()
    (reference,) = torch.autograd.grad(total, exact)

    assert 0.5 < (expected > 0).double().mean() < 0.75
    torch.testing.assert_close(ours[1].double(), expected.detach(), rtol=1e-5, atol=1e-6)
    rounding = 2.0**-8 if given.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(gradient.double(), reference, rtol=rounding, atol=1e-6)
    assert not gradient[..., TOKENS:].any()


def test_cross_entropies_have_megatrons_bits(rows):
    """So do their gradients, where the prediction is wrong or the weight is 0."""
    given, labels = rows

    def results(losses, weight):
        logits = given.clone().requires_grad_()
        cross_entropy, others = losses(logits * 1)
        (gradient,) = torch.autograd.grad((cross_entropy * 0.3 + others * weight).sum(), logits)
        return cross_entropy.detach(), gradient, others.detach()

    def megatrons(logits):
        found = vocab_parallel_cross_entropy(logits, labels.t().contiguous()).t()
        return found, torch.zeros_like(found)

    def ours(logits):
        return cross_entropy_and_entropy(labels, logits)

    expected, gradient, _ = results(megatrons, 0.0)
    for weight in (0.0, 0.7):
        found, own, others = results(ours, weight)
        assert torch.equal(found, expected)
        same = torch.ones_like(labels) > 0 if weight == 0.0 else others == 0.0
        assert same.sum() > 0 and torch.equal(own[same.t()], gradient[same.t()])
        assert weight == 0.0 or not torch.equal(own, gradient)
