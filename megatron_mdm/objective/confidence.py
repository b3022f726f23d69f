"""The confidence loss: the entropy of predictions that are right already.

r_i says whether no token has a greater logit at position i than the clean token, and H_i is the
entropy of the predicted distribution p_i. The confidence loss of a row is

    c = (1 / L_e) sum_i m_i w r_i H_i        nats per token,      H_i = -sum_v p_iv log p_iv

with the mask m, the weight w and the eligible tokens L_e of the loss l (loss.py). The run minimises
l + WEIGHT c. No gradient flows through r. A tie counts as right, so that r does not depend on the
order of the tokens.

Source: confidence-aware parallel training (CAP), section 5.2 and eq. 6 of the report of LLaDA2.0
(arXiv 2512.15745): L_SFT + lambda L_conf, where L_conf is the entropy at correctly predicted
tokens. The report does not say over what L_conf is averaged. LLaDA2.0's published program divides
the sum of r H by the number of right predictions in a micro-batch. Such a ratio changes with the
split of the batch. Here c has the weights and the denominator of l, so that every split of a batch
and every density of t with its weight 1/q(t) have the same objective. With equal weights, lambda is
WEIGHT times the share of masked tokens whose prediction is right.
"""

import torch


def entropy(p: torch.Tensor) -> torch.Tensor:
    """Entropy of distributions, or the part of it that belongs to a part of the vocabulary.

    Args:
        p: probabilities, float [..., V]; 0 adds nothing.

    Returns:
        -sum p log p, nats, float [...].
    """
    whole: torch.Tensor = torch.special.entr(p).sum(dim=-1)
    return whole


def entropy_gradient(p: torch.Tensor, whole: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Gradient of scale H at the logits, or at the logits of a part of the vocabulary.

    It is scale (-p_v log p_v - p_v H) at the logit of token v.

    Args:
        p: probabilities, float [..., V].
        whole: entropy H over the whole vocabulary, nats, float [...].
        scale: gradient of the loss at H, float [...].

    Returns:
        float [..., V].
    """
    gradient: torch.Tensor = torch.special.entr(p)
    return gradient.addcmul_(p, whole[..., None], value=-1.0).mul_(scale[..., None])
