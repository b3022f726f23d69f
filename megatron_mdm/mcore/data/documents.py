"""Documents of packed rows: their numbers, the positions in them, and what may be masked."""

import torch

from megatron_mdm.config import MDMConfig


def isolated_documents(tokens: torch.Tensor, eod_id: int, mdm: MDMConfig) -> torch.Tensor | None:
    """The documents that attention does not leave, int64 [b, s], in rows of text without padding.

    None: attention reaches over whole rows.
    """
    return document_numbers(tokens, eod_id) if mdm.isolate_documents else None


def document_numbers(tokens: torch.Tensor, eod_id: int) -> torch.Tensor:
    """Which document of its row each position is of, int64 [b, s]; a document ends with EOD."""
    ends = (tokens == eod_id).long()
    return ends.cumsum(dim=1) - ends


def position_ids(tokens: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
    """Positions for learned embeddings, int64 [b, s]; rotary ones are relative anyhow."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    if documents is None:
        return positions
    return positions - (positions * begins_of(documents)).cummax(dim=1).values


def begins_of(segments: torch.Tensor) -> torch.Tensor:
    """Positions where a part of a row begins, bool [b, s], of the numbers of the parts, [b, s]."""
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return begins


def eligible_positions(
    tokens: torch.Tensor,
    padding: torch.Tensor,
    eod_id: int,
    mdm: MDMConfig,
    documents: torch.Tensor | None,
) -> torch.Tensor:
    """Positions of text without a prompt that may be masked, bool [b, s].

    Args:
        tokens: clean tokens, int64 [b, s].
        padding: bool [b, s].
        eod_id: end-of-document token.
        mdm: settings of the objective.
        documents: the parts of rows that attention does not leave, int64 [b, s]; None: whole rows.
    """
    eligible = ~padding
    if not mdm.eod_eligible:
        eligible &= tokens != eod_id
    if mdm.pad_eligible:
        eligible |= padding
    if mdm.shift:  # nothing predicts the first token of what attention sees
        eligible &= position_ids(tokens, documents) > 0
    return eligible
