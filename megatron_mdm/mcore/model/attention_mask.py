"""The attention mask of a micro-batch: documents, padding, and annealing from causal attention."""

from collections.abc import Callable

import torch

from megatron_mdm.config import MDMConfig


def attention_mask(
    tokens: torch.Tensor,
    padding: torch.Tensor,
    eod_id: int,
    mdm: MDMConfig,
    documents: torch.Tensor | None,
    ahead: torch.Tensor | None = None,
    as_bounds: bool = False,
) -> torch.Tensor | None:
    """What positions do not attend to, in Megatron's convention.

    Args:
        tokens: clean tokens, int64 [b, s].
        padding: bool [b, s].
        eod_id: end-of-document token.
        mdm: settings of the objective.
        documents: number of each position's document, outside which it sees nothing, int64
            [b, s]; None: rows are not divided.
        ahead: positions that earlier ones attend to, bool [b, s] (see
            `annealed_future_positions`); None: all.
        as_bounds: for Transformer Engine, where documents are all that can divide a row.

    Returns:
        bool [b, 1, 1, s] or [b, 1, s, s], True = hidden, or `document_bounds`; None if every
        position is attended to.
    """
    if as_bounds:
        bounds = None if documents is None else document_bounds(documents)
        # Rows of one document each, as most of random lengths are, need no varying lengths.
        return None if bounds is None or len(bounds) == len(documents) + 1 else bounds
    if mdm.pad_attended and mdm.eod_attended and documents is None and ahead is None:
        return None
    hidden = torch.zeros_like(padding)
    if not mdm.pad_attended:
        hidden |= padding
    if not mdm.eod_attended:
        hidden |= (tokens == eod_id) & ~padding
    hidden = hidden[:, None, None, :]
    if ahead is not None:
        s = tokens.shape[1]
        later = torch.ones((s, s), dtype=torch.bool, device=tokens.device).triu(1)
        hidden = hidden | (later & ~ahead[:, None, None, :])
    if documents is not None:
        hidden = hidden | (documents[:, None, :, None] != documents[:, None, None, :])
    return hidden


def document_bounds(documents: torch.Tensor) -> torch.Tensor:
    """Where the documents of a micro-batch begin, its rows one after another, and their end.

    The host waits for the device once: kernels are told how many documents there are.

    Args:
        documents: number of each position's document in its row, int64 [b, s].

    Returns:
        int32 [documents + 1], from 0 to b s: `cu_seqlens` of Transformer Engine.
    """
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    bounds = begins.flatten().nonzero()[:, 0]
    return torch.nn.functional.pad(bounds, (0, 1), value=documents.numel()).to(torch.int32)


def annealed_future_positions(uniforms: torch.Tensor, progress: float) -> torch.Tensor | None:
    """Positions that earlier ones attend to on the way from causal to full attention.

    Each position of a row opens at a time of its own, and then stays open, as the annealing of
    DiffuLLaMA (arXiv 2410.17891) opens more and more of the positions ahead.

    Args:
        uniforms: grid integers of the masks [b, s]. Their last 20 bits, which decide no mask, are
            the times: so these too are functions of (seed, row), and nothing more is loaded.
        progress: 0 is causal, 1 full attention.

    Returns:
        bool [b, s]; None at the end.
    """
    if progress >= 1.0:
        return None
    return (uniforms & 0xFFFFF) < progress * 2**20


def attend_in_documents(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """Lays the rows of a micro-batch one after another for attention, and back.

    Args:
        attend: from three tensors [b s, heads, head size] to one [b s, ...].
        query: [s, b, heads, head size].
        key: [s, b, groups, head size].
        value: [s, b, groups, head size].

    Returns:
        [s, b, heads * head size].
    """
    s, b = query.shape[:2]
    flat = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
    return attend(*flat).reshape(b, s, -1).transpose(0, 1).contiguous()
