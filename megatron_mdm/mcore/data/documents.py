"""Documents of packed rows: their numbers, and the positions in them."""

import torch

from megatron_mdm.config import MDMConfig


def isolated_documents(tokens: torch.Tensor, eod_id: int, mdm: MDMConfig) -> torch.Tensor | None:
    """`documents` of `attention_mask` for rows of text, without padding."""
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
    begins = torch.ones_like(tokens, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return positions - (positions * begins).cummax(dim=1).values
