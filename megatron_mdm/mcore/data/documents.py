"""Documents in packed rows: document numbers, positions in documents, and eligible positions."""

import torch

from megatron_mdm.config import MDMConfig
from megatron_mdm.objective.segments import places


def isolated_documents(tokens: torch.Tensor, eod_id: int, mdm: MDMConfig) -> torch.Tensor | None:
    """Numbers of the documents that attention stays within, int64 [b, s], for rows without padding.

    None: attention spans whole rows.
    """
    return document_numbers(tokens, eod_id) if mdm.isolate_documents else None


def document_numbers(tokens: torch.Tensor, eod_id: int) -> torch.Tensor:
    """The number, within its row, of each position's document, int64 [b, s].

    A document ends with its end-of-document token.
    """
    ends = (tokens == eod_id).long()
    return ends.cumsum(dim=1) - ends


def position_ids(tokens: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
    """Positions for learned embeddings, int64 [b, s]; they start over in each document.

    Rotary embeddings are relative, so they do not need them.
    """
    if documents is None:
        return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return places(documents)


def eligible_positions(
    tokens: torch.Tensor,
    padding: torch.Tensor,
    eod_id: int,
    mdm: MDMConfig,
    documents: torch.Tensor | None,
) -> torch.Tensor:
    """Positions that may be masked in text without a prompt, bool [b, s].

    Args:
        tokens: clean tokens, int64 [b, s].
        padding: bool [b, s].
        eod_id: end-of-document token.
        mdm: settings of the objective.
        documents: the parts of rows that attention stays within, int64 [b, s]; None: whole rows.
    """
    eligible = ~padding
    if not mdm.eod_eligible:
        eligible &= tokens != eod_id
    if mdm.pad_eligible:
        eligible |= padding
    if mdm.shift:  # no position predicts the first token of a document or row
        eligible &= position_ids(tokens, documents) > 0
    return eligible
