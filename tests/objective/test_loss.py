"""Losses of rows, and their normalization."""

import pytest
import torch

from megatron_mdm.objective.loss import row_losses


def test_nothing_eligible_and_nothing_masked_count_with_loss_zero():
    cross_entropy = torch.ones(2, 3)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    losses = row_losses(cross_entropy, mask, torch.ones(2, 1), torch.tensor([0, 3]), "rows")
    assert losses.per_row.tolist() == [0.0, 0.0]
    assert losses.denominator == 2
    losses = row_losses(cross_entropy, mask, torch.ones(2, 1), torch.tensor([0, 3]), "tokens")
    assert losses.numerator == 0.0
    assert losses.denominator == 3


@pytest.mark.parametrize("normalization", ["tokens", "rows"])
def test_normalization_over_uneven_splits(normalization):
    """Sums over any split of a batch give the whole batch's loss, with unequal denominators."""
    generator = torch.Generator().manual_seed(0)
    ce = torch.rand(6, 8, generator=generator, dtype=torch.float64)
    num_eligible = torch.tensor([8, 1, 5, 3, 8, 2])
    mask = torch.arange(8) < num_eligible[:, None]
    weight = 1 + torch.rand(6, 1, generator=generator, dtype=torch.float64)
    if normalization == "tokens":
        expected = (ce * mask * weight).sum() / num_eligible.sum()
    else:
        expected = ((ce * mask * weight).sum(1) / num_eligible).mean()
    for sizes in ([6], [1, 5], [2, 2, 2], [4, 1, 1]):
        parts = [
            row_losses(c, m, w, n, normalization)
            for c, m, w, n in zip(
                *(x.split(sizes) for x in (ce, mask, weight, num_eligible)), strict=True
            )
        ]
        total = sum(p.numerator for p in parts) / sum(p.denominator for p in parts)
        assert float(total) == pytest.approx(float(expected), rel=1e-12)
