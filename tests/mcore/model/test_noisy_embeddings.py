"""Noise reaches the embeddings of masked positions, and nothing else."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megatron_mdm.mcore.model.noisy_embeddings import noisy_embeddings
from megatron_mdm.objective.embedding_noise import noise_keys, normals
from tests.one_rank import on_one_cpu_rank


class Stage(torch.nn.Module):
    """A stage whose embedding gives [s, b, h], like Megatron's."""

    def __init__(self, is_first):
        super().__init__()
        self.config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        if is_first:
            self.embedding = torch.nn.Embedding(5, 8)

    def forward(self, tokens):
        return self.embedding(tokens.t())


@pytest.fixture(autouse=True)
def one_rank():
    with on_one_cpu_rank():
        yield


def test_masked_positions_get_noise_inside_the_context():
    stage, tokens = Stage(True), torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    masked = tokens > 2
    keys = noise_keys(3, torch.tensor([8, 9]), torch.arange(4).expand(2, -1))
    before = stage(tokens)
    with noisy_embeddings(stage, 0.5, keys, masked):
        inside = stage(tokens)
    assert torch.equal(stage(tokens), before)
    expected = before + (0.5 * masked[..., None] * normals(keys, 8)).transpose(0, 1)
    torch.testing.assert_close(inside, expected)
    assert torch.equal(inside == before, ~masked.t()[..., None].expand_as(before))
    with noisy_embeddings(Stage(False), 0.5, keys, masked):
        pass
