"""The attention mask of a micro-batch: documents, padding, and annealing from causal attention."""

import torch
from megatron.core.transformer import TransformerConfig

from megatron_mdm.config import MDMConfig
from megatron_mdm.objective.blocks import showing_itself
from megatron_mdm.objective.segments import begins

HIDDEN_SCORE = -10000.0  # Megatron's own value of hidden scores; see `attention_bias`
OPENING_TIME_BITS = 20  # low bits of the 52 bits of a uniform


def attention_mask_argument(
    tokens: torch.Tensor,
    padding: torch.Tensor | None,
    eod_id: int,
    mdm: MDMConfig,
    segments: torch.Tensor | None,
    transformer_impl: str,
    visible_ahead: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor | None:
    """The model's argument `attention_mask`: a mask, or the positions where documents begin.

    Megatron passes this argument unchanged to every attention layer. Transformer Engine's layers
    take no mask here, so the argument carries `cu_seqlens` to `DocumentAttention` instead. With
    Transformer Engine only segments limit attention.

    Args:
        tokens: clean tokens, int64 [b, s].
        padding: bool [b, s]; None: no padding.
        eod_id: end-of-document token.
        mdm: settings of the objective.
        segments: the parts of rows that attention stays within, int64 [b, s]; None: whole rows.
        transformer_impl: the model's --transformer-impl.
        visible_ahead: see `dense_attention_mask`; not with `causal`.
        causal: whether the model is called inside `causal_attention`.

    Returns:
        The result of `document_cu_seqlens` for Transformer Engine, else of `causal_attention_mask`
        or `dense_attention_mask`. None if positions attend to whole rows, or (causal) to all
        earlier positions of whole rows.
    """
    if transformer_impl == "transformer_engine":
        return document_cu_seqlens(segments)
    if causal:
        return causal_attention_mask(segments)
    return dense_attention_mask(tokens, padding, eod_id, mdm, segments, visible_ahead)


def causal_attention_mask(segments: torch.Tensor | None) -> torch.Tensor | None:
    """Positions that an autoregressive model does not attend to, in Megatron's convention.

    The mask hides neither padding nor ends of documents, whatever the flags say. The first position
    of a segment can attend only to itself. If the mask hid it, the softmax would spread its
    attention over every position, later ones included.

    Args:
        segments: the parts of rows that attention stays within, int64 [b, s]; None: whole rows.

    Returns:
        bool [b, 1, s, s], True = not attended to; None for whole rows, because Megatron's local
        layers make the causal mask themselves if they get none.
    """
    if segments is None:
        return None
    return _later(segments) | _elsewhere(segments)


def dense_attention_mask(
    tokens: torch.Tensor,
    padding: torch.Tensor | None,
    eod_id: int,
    mdm: MDMConfig,
    segments: torch.Tensor | None,
    visible_ahead: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Positions that are not attended to, in Megatron's convention.

    A position sees itself if the mask would hide everything else, such as the only token of a
    document that is hidden. It would see other documents otherwise (see `showing_itself`).

    Args:
        tokens: clean tokens, int64 [b, s].
        padding: bool [b, s]; None: no padding.
        eod_id: end-of-document token.
        mdm: settings of the objective.
        segments: the parts of rows that attention stays within, int64 [b, s]; None: whole rows.
        visible_ahead: positions that earlier positions attend to, bool [b, s] (see
            `annealed_future_positions`); None: all.

    Returns:
        bool [b, 1, 1, s] or [b, 1, s, s], True = not attended to; None if every position attends to
        its whole row.
    """
    everywhere = mdm.pad_attended and mdm.eod_attended
    if everywhere and segments is None and visible_ahead is None:
        return None
    mask = hidden_tokens(tokens, padding, eod_id, mdm)[:, None, None, :]
    if visible_ahead is not None:
        mask = mask | (_later(tokens) & ~visible_ahead[:, None, None, :])
    if segments is not None:
        mask = mask | _elsewhere(segments)
    # Without hidden tokens every position sees itself. Without parts, all have one row of the mask.
    if everywhere or mask.shape[2] == 1:
        return mask
    return showing_itself(mask, torch.arange(tokens.shape[1], device=tokens.device))


def hidden_tokens(
    tokens: torch.Tensor, padding: torch.Tensor | None, eod_id: int, mdm: MDMConfig
) -> torch.Tensor:
    """Tokens that are hidden from attention, bool [b, s]; see `dense_attention_mask`."""
    hidden = torch.zeros_like(tokens, dtype=torch.bool)
    if padding is None:
        padding = hidden
    if not mdm.pad_attended:
        hidden = hidden | padding
    if not mdm.eod_attended:
        hidden = hidden | ((tokens == eod_id) & ~padding)
    return hidden


def _later(rows: torch.Tensor) -> torch.Tensor:
    """Whether the second position comes after the first, bool [s, s], in rows [b, s]."""
    s = rows.shape[1]
    return torch.ones((s, s), dtype=torch.bool, device=rows.device).triu(1)


def _elsewhere(segments: torch.Tensor) -> torch.Tensor:
    """Whether two positions belong to different segments, bool [b, 1, s, s]."""
    return segments[:, None, :, None] != segments[:, None, None, :]


def document_cu_seqlens(segments: torch.Tensor | None) -> torch.Tensor | None:
    """The starts of all segments in the concatenated rows of a micro-batch, and the total length.

    The host waits for the device once, because kernels need the number of segments.

    Args:
        segments: the parts of rows that attention stays within, int64 [b, s]; None: whole rows.

    Returns:
        int32 [segments + 1], from 0 to b s: `cu_seqlens` of Transformer Engine. None if every row
        is one segment (common with --mdm-random-length-fraction), which needs no varying lengths.
    """
    if segments is None:
        return None
    bounds = begins(segments).flatten().nonzero()[:, 0]
    if len(bounds) == len(segments):
        return None
    return torch.nn.functional.pad(bounds, (0, 1), value=segments.numel()).to(torch.int32)


def block_attention_mask(hidden: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    """The model's argument `attention_mask` for rows with blocks, which `BlockAttention` reads too.

    Args:
        hidden: True = not attended to, bool [b, 1, q, k].
        config: the model's transformer configuration.

    Returns:
        The result of `attention_bias` for Transformer Engine, else `hidden`.
    """
    if config.transformer_impl == "transformer_engine":
        return attention_bias(hidden, config.params_dtype)
    return hidden


def attention_bias(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as a sum term of the attention scores, which fused kernels take; no gradient.

    Hidden positions get a finite number, whose exponential is 0. Ring attention visits the keys in
    parts, and a query may see none of a part. Its softmax there would be NaN with -infinity.

    Args:
        hidden: True = not attended to, bool [b, 1, q, k].
        dtype: the dtype of queries, keys and values.

    Returns:
        `dtype` [b, 1, q, k]: 0 where a query sees a key, else `HIDDEN_SCORE`.
    """
    bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return bias.masked_fill_(hidden, HIDDEN_SCORE)


def annealed_future_positions(uniforms: torch.Tensor, progress: float) -> torch.Tensor | None:
    """Future positions visible to earlier ones while attention is annealed from causal to full.

    Each position of a row opens at its own time and then stays open. In the same way, the annealing
    of DiffuLLaMA (arXiv 2410.17891) opens more and more of the future positions.

    Args:
        uniforms: grid integers of the row, int64 [b, s].
        progress: 0 is causal, 1 is full attention.

    Returns:
        bool [b, s]; None at full attention.
    """
    if progress >= 1.0:
        return None
    return opening_times_from_uniforms(uniforms) < progress * 2**OPENING_TIME_BITS


def opening_times_from_uniforms(uniforms: torch.Tensor) -> torch.Tensor:
    """The time at which each position opens to earlier positions: the low bits of its uniform.

    The uniforms are drawn for masks. Their high bits decide the mask, and the low bits do not. The
    times are therefore functions of (seed, row) too, without additional numbers per row. A separate
    random stream would change the attention of a run that is resumed.

    Args:
        uniforms: grid integers of the row, int64 [b, s].

    Returns:
        int64 [b, s] in [0, 2^OPENING_TIME_BITS), uniform.
    """
    return uniforms & (2**OPENING_TIME_BITS - 1)
