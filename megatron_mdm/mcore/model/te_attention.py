"""Attention inside documents, and of rows with blocks, with Transformer Engine's fused kernels.

This module is imported only if Transformer Engine is in use.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from megatron_mdm.errors import UserError
from megatron_mdm.mcore.model.row_layout import attend_in_documents

NO_KERNEL = "No dot product attention backend is available"  # in Transformer Engine's ValueError


class DocumentAttention(TEDotProductAttention):
    """Megatron's attention, whose argument `attention_mask` holds the starts of documents.

    Hidden states stay [s, b, h] outside this layer, so the head, pipeline stages and sequence
    parallelism are not affected. Megatron's own packed sequences flatten the rows in every layer.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **rest: Any,
    ) -> torch.Tensor:
        """Attention of a micro-batch.

        Args:
            query: [s, b, heads, head size].
            key: [s, b, groups, head size].
            value: [s, b, groups, head size].
            attention_mask: starts of documents (see `document_cu_seqlens`); None: every position
                attends to its whole row.
            attn_mask_type: `causal` for causal attention; any other type means bidirectional.
            packed_seq_params: ignored; computed from `attention_mask`.
            rest: Megatron's other arguments.

        Returns:
            [s, b, heads * head size].
        """
        attend: Callable = super().forward
        causal = attn_mask_type is AttnMaskType.causal
        if attention_mask is None:
            whole = AttnMaskType.causal if causal else AttnMaskType.no_mask
            return attend(query, key, value, None, attn_mask_type=whole, **rest)

        def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            bounds = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=attention_mask,
                cu_seqlens_kv=attention_mask,
                max_seqlen_q=query.shape[0],  # an upper bound: no document is longer than a row
                max_seqlen_kv=query.shape[0],
            )
            # Transformer Engine's names for causal and full attention inside packed documents.
            inside = AttnMaskType.padding_causal if causal else AttnMaskType.padding
            return attend(q, k, v, None, attn_mask_type=inside, packed_seq_params=bounds, **rest)

        return attend_in_documents(packed, query, key, value)


class BlockAttention(DocumentAttention):
    """Attention of rows with blocks, whose argument `attention_mask` holds a bias of the scores.

    Megatron has an argument for a bias, but neither HybridModel nor recomputation passes it on. All
    layers of a micro-batch share the tensor. Rows without blocks are those of `DocumentAttention`.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **rest: Any,
    ) -> torch.Tensor:
        """Attention of a micro-batch.

        Args:
            query: see `DocumentAttention`; so are the arguments that are not listed.
            key: see there.
            value: see there.
            attention_mask: the result of `attention_bias`, [b, 1, q, k]; or a value of rows without
                blocks (see `DocumentAttention`).
            attn_mask_type: read only for rows without blocks.
            packed_seq_params: ignored.
            rest: Megatron's other arguments.

        Returns:
            [s, b, heads * head size].

        Raises:
            UserError: Transformer Engine has no fused kernel for these shapes on this GPU.
        """
        if attention_mask is None or not attention_mask.is_floating_point():
            return super().forward(
                query, key, value, attention_mask, attn_mask_type, packed_seq_params, **rest
            )
        attend: Callable = super(DocumentAttention, self).forward
        rest |= {"attention_bias": attention_mask.to(query.dtype)}
        try:
            return attend(query, key, value, None, attn_mask_type=AttnMaskType.no_mask, **rest)
        except ValueError as error:
            # Transformer Engine chooses the kernel here, and says no more than this.
            if NO_KERNEL not in str(error):
                raise
            raise UserError(
                "Transformer Engine has no fused attention for blocks with these shapes on this "
                "GPU (NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 show why): use --attention-backend unfused, "
                "which needs much more memory, or --transformer-impl local"
            ) from error
