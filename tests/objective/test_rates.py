"""Masking probabilities and numbers of masked tokens as functions of the rate."""

import torch

from megatron_mdm.objective.rates import masked_count, masking_probability


def test_masking_probability_spans_eps_to_one():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert masking_probability(t, 0.1).tolist() == [0.1, 0.55, 1.0]


def test_every_count_is_equally_likely():
    t = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = torch.bincount(masked_count(t, torch.full((1000,), 8)), minlength=9)
    assert counts.tolist() == [0] + [125] * 8


def test_masked_count_bounds():
    t = torch.tensor([1e-300, 1.0, 1.0, 0.3], dtype=torch.float64)
    assert masked_count(t, torch.tensor([7, 7, 0, 1])).tolist() == [1, 7, 0, 1]
