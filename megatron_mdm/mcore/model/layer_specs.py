"""Bidirectional attention in Megatron's layer specs, and a norm without fused kernels."""

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
    """Megatron's layer spec for this configuration, with bidirectional attention.

    Args:
        model_config: configuration from Megatron's `gpt_config_from_args`.
        mdm: settings of the objective. With `attends_everywhere` the spec uses no mask, so fused
            kernels stay available. Otherwise it uses a mask or, with Transformer Engine, attention
            inside documents (see `attention_mask_argument`) or a bias (see `attention_bias`).
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
        spec.layer_norm = TorchNorm
        for layer in spec.layer_specs:
            use_torch_norms(layer.submodules)
    else:
        spec = default_layer_spec(model_config, vp_stage)
    layers = spec.layer_specs if isinstance(spec, TransformerBlockSubmodules) else [spec]
    for layer in layers:
        make_bidirectional(layer.submodules.self_attention, mdm, transformer)
    return spec


def make_bidirectional(
    attention: ModuleSpec, mdm: MDMConfig, transformer: TransformerConfig
) -> None:
    """Changes the spec of a self-attention so that its mask is not causal.

    Args:
        attention: the spec, changed in place.
        mdm: see `bidirectional_spec`.
        transformer: Megatron's configuration.
    """
    mask_type = AttnMaskType.no_mask if mdm.attends_everywhere else AttnMaskType.padding
    attention.params["attn_mask_type"] = mask_type
    if transformer.transformer_impl == "transformer_engine" and (mdm.blocks or mdm.divides_rows):
        from megatron_mdm.mcore.model.te_attention import BlockAttention, DocumentAttention

        core = DocumentAttention if mdm.blocks is None else BlockAttention
        attention.submodules.core_attention = core


def use_torch_norms(submodules: Any) -> None:
    """Replaces the norms of a local layer by `TorchNorm`."""
    submodules.input_layernorm = TorchNorm
    if submodules.pre_mlp_layernorm is not IdentityOp:
        submodules.pre_mlp_layernorm = TorchNorm
    attention = submodules.self_attention.submodules
    for name in ("q_layernorm", "k_layernorm"):  # --qk-layernorm
        if getattr(attention, name) not in (None, IdentityOp):
            setattr(attention, name, TorchNorm)


class TorchNorm:
    """RMSNorm or LayerNorm of torch for the local spec, also under sequence parallelism.

    Megatron's wrapper of the torch norms refuses sequence parallelism, because each rank's
    gradients are sums over its part of the sequence. This class marks the parameters, so that
    Megatron all-reduces their gradients over the tensor-parallel group, as for its own norms.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5) -> Any:
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


def drop_norm_extra_state(model: torch.nn.Module) -> None:
    """Removes the extra state of Transformer Engine's norms, which is empty, from checkpoints.

    The norms of local layers have no extra state. A model with Transformer Engine would look for it
    in their checkpoints and not find it.

    Args:
        model: model with layers of either implementation.
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
