"""From cross entropies to the numerator and denominator of the objective.

CE_i is the cross entropy of the clean token at i given the masked row (nats), m is the mask, w is
its weight (importance weight of t included) and L_e is the number of eligible tokens. The loss of a
row, or of each segment with its own masking rate (objective/segments.py), is

    l = (1 / L_e) sum_i m_i w CE_i                                            nats per token.

The denominator counts ELIGIBLE tokens, never masked ones: division by the number of masked tokens
would give a ratio estimator, which is biased. The documents of a packed row therefore contribute as
they would in rows of their own.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from megatron_mdm.objective.segments import to_positions, totals

Normalization = Literal["tokens", "rows"]


@dataclass(frozen=True)
class RowLosses:
    """The losses of B rows.

    Attributes:
        per_row: l of each row [B], or of each segment [B, L], nats per eligible token; 0 where
            nothing is eligible.
        numerator: contribution to the numerator of the global batch's loss, scalar, with gradient.
        denominator: contribution to the denominator of the global batch's loss, int64 scalar.
    """

    per_row: torch.Tensor
    numerator: torch.Tensor
    denominator: torch.Tensor


class Units(NamedTuple):
    """The parts of rows that the normalization `rows` averages over.

    Attributes:
        segments: see objective/segments.py; None: whole rows.
        num_eligible: L_e of each, int64 [B], or [B, L] with segments.
    """

    segments: torch.Tensor | None
    num_eligible: torch.Tensor


def row_losses(
    cross_entropy: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor,
    num_eligible: torch.Tensor,
    normalization: Normalization,
    segments: torch.Tensor | None = None,
    units: Units | None = None,
) -> RowLosses:
    """Weights and sums cross entropies: the objective (LLaDA, arXiv 2502.09992).

    Numerators and denominators are summed over micro-batches and data-parallel ranks, so that any
    split of a global batch gives the same objective. With `tokens`, the objective is the sum of all
    weighted losses divided by the number of all eligible tokens. With `rows`, it is the mean over
    all units of the sum of weighted losses divided by the L_e of the unit. Units are whole rows,
    which all count, or segments with eligible tokens (padding is not a segment). If segments are
    smaller than units, as blocks are, each counts by its share of the unit's eligible tokens.

    Args:
        cross_entropy: CE, nats, float [B, L].
        mask: which positions are masked, bool [B, L].
        weight: w of masked tokens, float64 [B, 1] or [B, L].
        num_eligible: L_e, int64 [B], or [B, L] with segments.
        normalization: see above.
        segments: see objective/segments.py; None: whole rows.
        units: parts that `rows` averages over; None: the segments.
    """
    dtype = torch.promote_types(cross_entropy.dtype, torch.float32)
    per_token = torch.where(mask, cross_entropy.to(dtype), 0.0) * weight.to(dtype)
    size = num_eligible.clamp(min=1).to(dtype)
    per_row = totals(per_token, segments) / size
    if normalization == "tokens":
        return RowLosses(per_row, per_token.sum(), num_eligible.sum())
    if units is None:
        units = Units(segments, num_eligible)
    size = units.num_eligible.clamp(min=1).to(dtype)
    if units.segments is not None:
        per_unit = per_token / to_positions(size, units.segments)
        return RowLosses(per_row, per_unit.sum(), (units.num_eligible > 0).sum())
    # Created on the device: a copy from the host would make the host wait.
    count = torch.full((), mask.shape[0], dtype=torch.int64, device=mask.device)
    return RowLosses(per_row, (per_token.sum(dim=1) / size).sum(), count)
