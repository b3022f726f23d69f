"""Decoding: from masked positions to tokens, over a callable that gives logits."""

from collections.abc import Callable

import torch

LogitsFunction = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def fill_masks(
    logits: LogitsFunction,
    tokens: torch.Tensor,
    mask_token_id: int,
    steps: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Fills the masked positions, the most confident predictions first.

    Every step predicts all masked positions, keeps the predictions of highest probability and masks
    the others again (low-confidence remasking, LLaDA, arXiv 2502.09992). The positions are spread
    evenly over the steps.

    Args:
        logits: tokens int64 [B, L] -> logits float [B, L, V] of the clean tokens, unshifted.
        tokens: int64 [B, L], `mask_token_id` where a token is wanted; the rest is kept.
        mask_token_id: id of the mask token, which is never predicted.
        steps: number of model calls, at least 1; never more than masked positions are used.
        temperature: 0 takes the likeliest token; else tokens are sampled from the softmax of
            logits / temperature.
        generator: of the random numbers, on the device of `tokens`.

    Returns:
        int64 [B, L] without mask tokens.
    """
    tokens = tokens.clone()
    for remaining in range(steps, 0, -1):
        masked = tokens == mask_token_id
        left = masked.sum(dim=1)
        if not left.any():
            break
        scores = logits(tokens).double()
        scores[..., mask_token_id] = -torch.inf
        probabilities = scores.softmax(dim=-1)
        if temperature > 0:
            tempered = (scores / temperature).softmax(dim=-1)
            picks = torch.multinomial(tempered.flatten(0, 1), 1, generator=generator)
            prediction = picks.view_as(tokens)
        else:
            prediction = probabilities.argmax(dim=-1)
        confidence = probabilities.gather(-1, prediction[..., None])[..., 0]
        confidence = confidence.masked_fill(~masked, -1.0)
        count = -(-left // remaining)  # rounded up, so that the last step leaves nothing
        rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        tokens = torch.where(masked & (rank < count[:, None]), prediction, tokens)
    return tokens
