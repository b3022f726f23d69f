import dataclasses
from argparse import Namespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_mdm.environment import silent_import
from megatron_mdm.sizing.flops import ModelShape, mfu
from tests.one_rank import on_one_cpu_rank

ROWS = 2
DENSE = ModelShape(
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=88,
    num_attention_heads=4,
    vocab_size=128,
    seq_length=64,
)
SHAPES = {
    "dense": DENSE,
    "grouped queries, wide heads, no gate, tied": dataclasses.replace(
        DENSE, num_query_groups=2, kv_channels=16, gated=False, tied=True
    ),
    "experts": dataclasses.replace(
        DENSE, num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24, moe_shared_expert_size=40
    ),
}


def _model(shape):
    """Megatron's GPTModel of this shape, with our layer spec."""
    with silent_import():
        from megatron.core.models.gpt import GPTModel
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
        from megatron.core.transformer import TransformerConfig
        from megatron.training.models.gpt import GPTModelConfig

        from megatron_mdm.config import MDMConfig
        from megatron_mdm.mcore.model.layer_specs import bidirectional_spec
    model_parallel_cuda_manual_seed(1)
    experts = {}
    if shape.num_experts:
        experts = dict(
            num_moe_experts=shape.num_experts,
            moe_router_topk=shape.moe_router_topk,
            moe_ffn_hidden_size=shape.moe_ffn_hidden_size,
            moe_shared_expert_intermediate_size=shape.moe_shared_expert_size or None,
            moe_token_dispatcher_type="alltoall",
        )
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups or shape.num_attention_heads,
        kv_channels=shape.kv_channels,
        gated_linear_unit=shape.gated,
        add_bias_linear=False,
        normalization="RMSNorm",
        transformer_impl="local",
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **experts,
    )
    spec = bidirectional_spec(
        GPTModelConfig(transformer=config, vocab_size=shape.vocab_size), MDMConfig(), None
    )
    return GPTModel(
        config,
        spec,
        shape.vocab_size,
        shape.seq_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=shape.tied,
    )


def _counted(shape, fraction):
    """Operations per token that torch counts, forward and backward; and weights in matrices."""
    with silent_import():
        from megatron_mdm.mcore.model.masked_head import HeadContext, MaskedPositions, head
    with on_one_cpu_rank():
        model = _model(shape)
        tokens = torch.randint(shape.vocab_size, (ROWS, shape.seq_length))
        mask = torch.zeros(tokens.shape, dtype=torch.bool)
        mask[:, : int(fraction * shape.seq_length)] = True
        positions = MaskedPositions(mask) if fraction < 1 else None
        counter = FlopCounterMode(display=False)
        with counter:
            losses = model(
                tokens,
                None,
                None,
                labels=tokens,
                output_processor=head,
                output_processor_context=HeadContext(positions),
            )
            losses[mask].sum().backward()
        weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    return counter.get_total_flops() / tokens.numel(), weights


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_flops_are_those_that_torch_counts_in_megatrons_model(shape, fraction):
    flops, weights = _counted(shape, fraction)
    assert shape.training_flops(fraction) == flops
    assert shape.num_parameters == weights


def test_causal_attention_counts_the_scores_that_it_uses():
    shape = dataclasses.replace(DENSE, vocab_size=0)
    lower = torch.ones(shape.seq_length, shape.seq_length).tril().mean().item()
    without = dataclasses.replace(shape, seq_length=0).forward_flops()
    full, causal = shape.forward_flops(), shape.forward_flops(causal=True)
    assert (causal - without) / (full - without) == pytest.approx(lower)


def test_mfu_of_a_known_model():
    # LLaDA-8B (arXiv 2502.09992): 8.02e9 parameters, 6.98e9 of them outside embeddings.
    llada = ModelShape(32, 4096, 12288, 32, 126464, 4096)
    assert llada.num_parameters == pytest.approx(8.02e9, rel=1e-3)
    assert llada.num_parameters - 2 * 4096 * 126464 == pytest.approx(6.98e9, rel=1e-3)
    # 6 x the weights in matrix products, and 12 x layers x width x positions for attention.
    by_hand = 6 * (6.98e9 + 4096 * 126464) + 12 * 32 * 4096 * 4096
    assert llada.training_flops() == pytest.approx(by_hand, rel=1e-3)
    assert mfu(llada.training_flops(), 1e4, 1e15) == pytest.approx(by_hand * 1e-11, rel=1e-3)


def test_layers_of_a_pattern_are_counted_one_by_one():
    sizes = dict(
        moe_layer_freq=1,
        num_layers=7,
        hidden_size=32,
        ffn_hidden_size=88,
        num_attention_heads=4,
        padded_vocab_size=128,
        seq_length=64,
        group_query_attention=False,
        kv_channels=8,
        swiglu=True,
        untie_embeddings_and_output_weights=True,
        num_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=24,
        moe_shared_expert_intermediate_size=None,
    )
    shape = ModelShape.from_args(Namespace(**sizes, hybrid_layer_pattern="*-*E|*--"))
    attention, dense, experts = 4 * 32 * 32, 3 * 32 * 88, 32 * 4 + 2 * 3 * 32 * 24
    weights = 3 * attention + 3 * dense + experts + 32 * 128
    assert shape.forward_flops() == 2 * (weights + 3 * 2 * 32 * 64)
