"""Noise as a function of counters: standard normal numbers that no layout changes."""

import pytest
import torch
from scipy import stats

from megatron_mdm.objective.embedding_noise import noise_keys, normals


def test_numbers_are_standard_normal_and_independent():
    positions = torch.arange(64).expand(4, -1)
    values = normals(noise_keys(7, torch.tensor([0, 1, 2, 2**40]), positions), 256).double()
    assert values.shape == (4, 64, 256) and values.isfinite().all()
    assert stats.kstest(values.flatten().numpy(), "norm").pvalue > 1e-3
    # Neighbours in every direction are uncorrelated, up to 4 standard errors.
    for axis in range(3):
        n = values.shape[axis]
        one, other = values.narrow(axis, 0, n - 1), values.narrow(axis, 1, n - 1)
        assert abs((one * other).mean()) < 4 / one.numel() ** 0.5


def test_a_number_depends_on_seed_row_position_and_channel_alone():
    whole = normals(noise_keys(1, torch.tensor([5, 6]), torch.arange(8).expand(2, -1)), 12)
    part = normals(noise_keys(1, torch.tensor([6]), torch.tensor([[3, 7]])), 12)
    assert torch.equal(part[0], whole[1, [3, 7]])
    assert torch.equal(
        normals(noise_keys(1, torch.tensor([5]), torch.tensor([[2]])), 4), whole[:1, 2:3, :4]
    )
    other = normals(noise_keys(2, torch.tensor([5, 6]), torch.arange(8).expand(2, -1)), 12)
    assert not (other == whole).any()


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1])
def test_any_seed_has_keys(seed):
    keys = noise_keys(seed, torch.arange(3), torch.arange(5).expand(3, -1))
    assert keys.dtype == torch.int64 and len(keys.unique()) == 15
