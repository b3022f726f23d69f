"""Masks of rows and their Horvitz-Thompson weights, from uniforms and masking rates.

Shapes: B rows of L positions. Each row, or each of its segments (objective/segments.py), has its
own masking rate. A row without a masked token is valid: its loss is 0 and counts.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from megatron_mdm.objective.randomness import GRID_BITS
from megatron_mdm.objective.rates import masked_count, masking_probability
from megatron_mdm.objective.segments import counts, products, rank_within_segment, to_positions


def bernoulli_mask(
    u: torch.Tensor,
    eligible: torch.Tensor,
    t: torch.Tensor,
    eps: float,
    segments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bernoulli masks: masks an eligible position i if u_i < p(t).

    Args:
        u: uniforms in (0, 1), float64 [B, L].
        eligible: positions that may be masked, bool [B, L].
        t: masking rates of the segments, float64 [B, L], or [B] for whole rows.
        eps: see `masking_probability`.
        segments: see objective/segments.py.

    Returns:
        mask, bool [B, L], and the weight 1/p(t) of its tokens, float64 [B, L], or [B, 1] for whole
        rows.
    """
    p = to_positions(masking_probability(t, eps), segments)
    return (u < p) & eligible, 1.0 / p


def exact_count_mask(
    u: torch.Tensor,
    eligible: torch.Tensor,
    t: torch.Tensor,
    segments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks the k = ceil(t L_e) eligible positions of a segment with the smallest uniforms.

    Args:
        u: uniforms in (0, 1), float64 [B, L].
        eligible: positions that may be masked, bool [B, L]; L_e of them in a segment.
        t: masking rates of the segments, float64 [B, L], or [B] for whole rows.
        segments: see objective/segments.py.

    Returns:
        mask, bool [B, L], and the weight L_e/k of its tokens (1 where L_e = 0), float64 [B, L], or
        [B, 1] for whole rows.
    """
    num_eligible = counts(eligible, segments)
    k = masked_count(t, num_eligible)
    mask = rank_within_segment(torch.where(eligible, u, 2.0), segments) < to_positions(k, segments)
    weight = num_eligible.clamp(min=1).to(torch.float64) / k.clamp(min=1)
    return mask, to_positions(weight, segments)


def isad_mask(
    u: torch.Tensor,
    eligible: torch.Tensor,
    t: torch.Tensor,
    eps: float,
    chosen: torch.Tensor,
    delta: float,
    weight: Literal["inclusion", "exact"],
    segments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ISAD (arXiv 2511.18159): Bernoulli masks in which chosen tokens are masked more often.

    Chosen positions are masked with probability p_i = min(p + delta, 1), the others with p.

    `inclusion` (the paper's idea) weights the cross entropy at i by 1/p_i. This corrects how often
    token i itself is predicted. But the contexts of the other tokens now have the chosen tokens
    masked more often, so the objective shifts a little.

    `exact` weights the whole segment by the likelihood ratio of its mask,
    prod_j (p/p_j)^m_j ((1-p)/(1-p_j))^(1-m_j), on top of 1/p. This is exactly unbiased, but
    heavy-tailed if many tokens are chosen. With p_i = 1, masks that leave position i visible would
    never be drawn, although the objective contains them. `exact` therefore limits p_i to (1 + p)/2.

    Args:
        u: uniforms in (0, 1), float64 [B, L].
        eligible: positions that may be masked, bool [B, L].
        t: masking rates of the segments, float64 [B, L], or [B] for whole rows.
        eps: see `masking_probability`.
        chosen: positions that are masked more often, bool [B, L].
        delta: added to their masking probability, in [0, 1].
        weight: `inclusion` or `exact`, see above.
        segments: see objective/segments.py.

    Returns:
        mask, bool [B, L], and the weight of the cross entropy at each position, float64 [B, L].
    """
    p = to_positions(masking_probability(t, eps), segments)
    raised = (p + delta).clamp(max=1.0)
    if weight == "exact":
        raised = torch.minimum(raised, (1.0 + p) / 2.0)
    probability = torch.where(chosen, raised, p)
    mask = (u < probability) & eligible
    if weight == "inclusion":
        return mask, 1.0 / probability
    # If p = 1, p_j is 1 and every position is masked. The ratio would be 0/0, but is not used.
    kept = torch.where(mask, 1.0, (1.0 - p) / (1.0 - probability).clamp(min=1e-300))
    ratio = torch.where(mask, p / probability, kept)
    whole = products(torch.where(eligible, ratio, 1.0), segments)
    return mask, (to_positions(whole, segments) / p).expand_as(probability)


def syrm(
    prompt: npt.NDArray[np.int64],
    token_ids: tuple[int, ...],
    fraction: float,
    uniforms: npt.NDArray[np.int64],
) -> npt.NDArray[np.bool_]:
    """SyRM (arXiv 2511.18159): selects prompt tokens that become eligible beside the response.

    This CHANGES THE OBJECTIVE: the loss then includes prompt tokens, and responses are predicted
    from prompts with gaps.

    Args:
        prompt: token ids of the prompt, int64 [n].
        token_ids: structural tokens, which are always eligible.
        fraction: probability that each of the other prompt tokens is eligible.
        uniforms: grid integers [n], independent of those of the masks; the views of a text share
            them.

    Returns:
        Which prompt tokens are eligible, bool [n].
    """
    return np.isin(prompt, token_ids) | (uniforms < fraction * 2.0**GRID_BITS)
