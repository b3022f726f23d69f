"""Megatron's HybridModel, the successor of GPTModel, with bidirectional attention.

A pattern names the layers: `*` attention, `-` MLP, `E` mixture of experts. `*-` is GPTModel's dense
layer as two layers with the same weights, so Megatron loads GPTModel's checkpoints into it.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.model.layer_specs import TorchNorm, make_bidirectional, use_torch_norms


class HybridModelWithHead(HybridModel):
    """HybridModel with the `output_processor` of GPTModel."""

    post_process: bool

    def forward(
        self,
        *args: Any,
        labels: torch.Tensor | None = None,
        output_processor: Any = None,
        output_processor_context: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """HybridModel's `forward`, with two arguments of GPTModel's that mean the same here."""
        if output_processor is None or not self.post_process:
            return super().forward(*args, labels=labels, **kwargs)
        # Without `post_process` the forward pass returns before the head, with the hidden states.
        self.post_process = False
        try:
            hidden_states = super().forward(*args, **kwargs)
        finally:
            self.post_process = True
        tied = self.share_embeddings_and_output_weights
        return output_processor(
            hidden_states=hidden_states,
            output_layer=self.output_layer,
            output_weight=self.shared_embedding_or_output_weight() if tied else None,
            labels=labels,
            compute_language_model_loss=self.compute_language_model_loss,
            scale_logits=self._scale_logits,
            config=self.config,
            context=output_processor_context,
        )


class LocalHybridStack(HybridStack):
    """HybridStack with a final norm that needs no GPU. Megatron's is Transformer Engine's norm."""

    def __init__(self, config: TransformerConfig, submodules: Any, **kwargs: Any) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **kwargs)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = TorchNorm(config, config.hidden_size, config.layernorm_epsilon)


def bidirectional_stack(config: TransformerConfig, mdm: MDMConfig) -> ModuleSpec:
    """Spec of the layers with bidirectional attention.

    Args:
        config: Megatron's transformer configuration.
        mdm: settings of the objective.
    """
    spec = _local_stack(config) if config.transformer_impl == "local" else _fused_stack()
    attention = spec.submodules.attention_layer.submodules.self_attention
    make_bidirectional(attention, mdm, config)
    return spec


def _fused_stack() -> ModuleSpec:
    """Megatron's own spec, with a copy of its attention spec that may be changed.

    A deep copy of the whole spec is impossible: other parts hold objects that cannot be copied.
    """
    layers = hybrid_stack_spec.submodules
    parts = layers.attention_layer.submodules
    attention = replace(
        parts.self_attention,
        params=dict(parts.self_attention.params),
        submodules=copy.copy(parts.self_attention.submodules),
    )
    layer = replace(layers.attention_layer, submodules=replace(parts, self_attention=attention))
    return replace(hybrid_stack_spec, submodules=replace(layers, attention_layer=layer))


def _local_stack(config: TransformerConfig) -> ModuleSpec:
    """GPTModel's local layers, each split into an attention layer and an MLP layer."""

    def gpt_layer(num_experts: int | None) -> TransformerLayerSubmodules:
        layer = get_gpt_layer_local_submodules(
            num_experts=num_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
            qk_l2_norm=config.qk_l2_norm,
            normalization=config.normalization,
        )
        use_torch_norms(layer)
        return layer

    def mlp_of(layer: TransformerLayerSubmodules) -> ModuleSpec:
        return ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=TorchNorm,
                mlp=layer.mlp,
                mlp_bda=layer.mlp_bda,
                sharded_state_dict_keys_map=layer.sharded_state_dict_keys_map,
            ),
        )

    dense = gpt_layer(None)
    attention = TransformerLayerSubmodules(
        input_layernorm=TorchNorm,
        self_attention=dense.self_attention,
        self_attn_bda=dense.self_attn_bda,
        sharded_state_dict_keys_map=dense.sharded_state_dict_keys_map,
    )
    layers = HybridStackSubmodules(
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
        mlp_layer=mlp_of(dense),
    )
    if config.num_moe_experts:
        layers.moe_layer = mlp_of(gpt_layer(config.num_moe_experts))
    return ModuleSpec(module=LocalHybridStack, submodules=layers)
