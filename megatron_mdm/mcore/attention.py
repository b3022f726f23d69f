"""Bidirectional attention in Megatron's layer specs, and a norm without fused kernels."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_mdm.config import MDMConfig
from megatron_mdm.errors import UserError


def bidirectional_spec(model_config: GPTModelConfig, mdm: MDMConfig, vp_stage: int | None) -> Any:
    """Megatron's layer spec for this configuration, with attention in both directions.

    Args:
        model_config: as made by Megatron's `gpt_config_from_args`.
        mdm: settings of the objective: with `attends_everywhere` no mask at all, so that fused
            kernels stay available; else a padding mask (see `attention_mask`), or, by Transformer
            Engine, attention inside documents (see `document_bounds`).
        vp_stage: virtual pipeline stage.

    Returns:
        A ModuleSpec or TransformerBlockSubmodules.
    """
    transformer = model_config.transformer
    if transformer.transformer_impl == "local":
        spec = get_gpt_decoder_block_spec(
            transformer,
            use_transformer_engine=False,
            normalization=transformer.normalization,
            qk_l2_norm=transformer.qk_l2_norm,
            vp_stage=vp_stage,
        )
        spec.layer_norm = Norm
        for layer in spec.layer_specs:
            use_own_norm(layer.submodules)
    else:
        spec = default_layer_spec(model_config, vp_stage)
    layers = spec.layer_specs if isinstance(spec, TransformerBlockSubmodules) else [spec]
    for layer in layers:
        attend_both_ways(layer.submodules.self_attention, mdm, transformer)
    return spec


def attend_both_ways(attention: ModuleSpec, mdm: MDMConfig, transformer: TransformerConfig) -> None:
    """Tells the spec of a self-attention that its mask is not causal.

    Args:
        attention: to be changed.
        mdm: see `bidirectional_spec`.
        transformer: Megatron's configuration.
    """
    mask_type = AttnMaskType.no_mask if mdm.attends_everywhere else AttnMaskType.padding
    attention.params["attn_mask_type"] = mask_type
    if mdm.divides_rows and transformer.transformer_impl == "transformer_engine":
        from megatron_mdm.mcore.packed_attention import DocumentAttention

        attention.submodules.core_attention = DocumentAttention


def use_own_norm(submodules: Any) -> None:
    """Replaces the norms of a local layer by `Norm`."""
    submodules.input_layernorm = Norm
    if submodules.pre_mlp_layernorm is not IdentityOp:
        submodules.pre_mlp_layernorm = Norm
    attention = submodules.self_attention.submodules
    for name in ("q_layernorm", "k_layernorm"):  # --qk-layernorm
        if getattr(attention, name) not in (None, IdentityOp):
            setattr(attention, name, Norm)


class Norm:
    """RMSNorm or LayerNorm of torch for the local spec, also under sequence parallelism.

    Megatron's wrapper of the torch norms refuses sequence parallelism because their gradients are
    sums over a part of the sequence; marking the parameters lets Megatron all-reduce these over the
    tensor-parallel group, as it does for its own norms.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
        """Builds the norm that `config.normalization` names."""
        if config.layernorm_zero_centered_gamma:
            raise UserError(
                "--apply-layernorm-1p needs Transformer Engine: leave it out, or use "
                "--transformer-impl transformer_engine"
            )
        kinds = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        norm = kinds[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def leave_out_state_of_norms(model: torch.nn.Module) -> None:
    """Takes Transformer Engine's extra state of norms, which is empty, out of checkpoints.

    Norms of local layers have none, and a checkpoint of theirs would lack it.

    Args:
        model: with layers of either implementation.
    """

    def leave_out(_: Any, state: dict[str, Any], prefix: str, *__: Any) -> None:
        state.pop(f"{prefix}_extra_state", None)

    def put_in(_: Any, state: dict[str, Any], prefix: str, *__: Any) -> None:
        state.setdefault(f"{prefix}_extra_state", None)

    for module in model.modules():
        kind = type(module)
        if kind.__module__.startswith("transformer_engine") and kind.__name__.endswith("Norm"):
            module.register_state_dict_post_hook(leave_out)
            module.register_load_state_dict_pre_hook(put_in)


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
        ahead: positions that earlier ones attend to, bool [b, s] (see `seen_ahead`); None: all.
        as_bounds: for Transformer Engine, where documents are all that can divide a row.

    Returns:
        bool [b, 1, 1, s] or [b, 1, s, s], True = hidden, or `document_bounds`; None if every
        position is attended to.
    """
    if as_bounds:
        bounds = None if documents is None else document_bounds(documents)
        # Rows of one document each, as most of random lengths are, need no varying lengths.
        return None if bounds is None or len(bounds) == len(documents) + 1 else bounds
    if mdm.mdm_pad_attended and mdm.mdm_eod_attended and documents is None and ahead is None:
        return None
    hidden = torch.zeros_like(padding)
    if not mdm.mdm_pad_attended:
        hidden |= padding
    if not mdm.mdm_eod_attended:
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


def isolated_documents(tokens: torch.Tensor, eod_id: int, mdm: MDMConfig) -> torch.Tensor | None:
    """`documents` of `attention_mask` for rows of text, without padding."""
    return document_numbers(tokens, eod_id) if mdm.mdm_isolate_documents else None


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


def seen_ahead(uniforms: torch.Tensor, progress: float) -> torch.Tensor | None:
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
