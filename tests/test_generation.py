import torch

from megatron_mdm.generation import fill_masks

MASK = 9


def model(tokens):
    """Position i wants token i, the more confidently the smaller i; the mask token most of all."""
    L = tokens.shape[1]
    logits = torch.zeros(*tokens.shape, 10)
    for i in range(L):
        logits[:, i, i] = 5.0 + L - i
    logits[..., MASK] = 100.0
    return logits


def test_fills_every_mask_and_keeps_the_prompt():
    tokens = torch.tensor([[7, MASK, MASK, MASK], [MASK, MASK, 7, 7]])
    for steps in (1, 2, 3, 50):
        filled = fill_masks(model, tokens, MASK, steps)
        assert filled.tolist() == [[7, 1, 2, 3], [0, 1, 7, 7]]


def test_confident_positions_come_first():
    calls = []

    def recording(tokens):
        calls.append((tokens[0] == MASK).nonzero().flatten().tolist())
        return model(tokens)

    fill_masks(recording, torch.full((1, 5), MASK), MASK, steps=3)
    assert calls == [[0, 1, 2, 3, 4], [2, 3, 4], [4]]


def test_steps_beyond_the_masks_cost_nothing():
    calls = []
    fill_masks(lambda x: calls.append(1) or model(x), torch.full((1, 3), MASK), MASK, steps=99)
    assert len(calls) == 3


def test_sampling_is_seeded_and_never_gives_the_mask():
    def flat(tokens):
        return torch.zeros(*tokens.shape, 10)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return fill_masks(flat, torch.full((4, 8), MASK), MASK, 4, 1.0, generator)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not (draw(1) == MASK).any()
