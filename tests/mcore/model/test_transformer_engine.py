"""Transformer Engine's spec builds with bidirectional attention and has the local spec's keys.

No part of Transformer Engine computes without a GPU, but its modules can be built where its
libraries load.
"""

import dataclasses
import itertools
import os
from pathlib import Path

import pytest
import torch
from megatron.core import mpu

from megatron_mdm.mcore.device import training_device
from tests import HAS_TRANSFORMER_ENGINE, ranks

pytestmark = pytest.mark.skipif(
    not HAS_TRANSFORMER_ENGINE, reason="Transformer Engine is not installed (README.md, Install)"
)


def transformer_engine_spec() -> None:
    """Builds the model from both specs, also for FP8, and compares their checkpoint keys."""

    import torch.distributed
    from megatron.core import dist_checkpointing as checkpoints
    from megatron.core.extensions.transformer_engine import (
        TELayerNormColumnParallelLinear,
        TELinear,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.training.models.gpt import GPTModelConfig

    from megatron_mdm.config import MDMConfig
    from megatron_mdm.mcore.model.builder import accumulate_in_place
    from megatron_mdm.mcore.model.layer_specs import bidirectional_spec, drop_norm_extra_state

    with training_device("cpu"):
        torch.distributed.init_process_group("gloo")
        mpu.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        transformer = TransformerConfig(
            num_layers=2,
            hidden_size=64,
            num_attention_heads=4,
            num_query_groups=2,
            ffn_hidden_size=128,
            use_cpu_initialization=True,
            normalization="RMSNorm",
            add_bias_linear=False,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
        )

        def build(mdm, **changes):
            config = dataclasses.replace(transformer, **changes)
            spec = bidirectional_spec(GPTModelConfig(transformer=config, vocab_size=128), mdm, None)
            model = GPTModel(config, spec, 128, 64, position_embedding_type="rope")
            drop_norm_extra_state(model)
            return model

        def keys(model):
            state = model.sharded_state_dict()
            names = {getattr(v, "key", k) for k, v in state.items() if v is not None}
            return {name for name in names if not name.endswith("_extra_state")}  # FP8 scales

        everywhere, hidden = MDMConfig(), MDMConfig(pad_attended=False)
        local = build(everywhere, transformer_impl="local")
        te = build(everywhere, transformer_impl="transformer_engine")
        accumulate_in_place(te)
        linears = [
            m for m in te.modules() if isinstance(m, (TELinear, TELayerNormColumnParallelLinear))
        ]
        assert len(linears) == 8 and all(m.fuse_wgrad_accumulation for m in linears)
        assert keys(te) == keys(local), keys(te) ^ keys(local)
        directory = Path(os.environ["TRACE_DIR"])
        for name in ("local", "te0", "te1"):
            (directory / name).mkdir()
        checkpoints.save(local.sharded_state_dict(), directory / "local")
        fp8 = {"fp8": "hybrid"}
        for changes in ({}, fp8):  # from the CPU to the GPU and back
            there = build(everywhere, transformer_impl="transformer_engine", **changes)
            there.load_state_dict(checkpoints.load(there.sharded_state_dict(), directory / "local"))
            path = directory / f"te{len(changes)}"
            checkpoints.save(there.sharded_state_dict(), path)
            back = build(everywhere, transformer_impl="local")
            back.load_state_dict(checkpoints.load(back.sharded_state_dict(), path))
            for name, value in local.named_parameters():
                assert torch.equal(back.get_parameter(name), value), name
        fp8 = {"fp8": "hybrid", "bf16": True, "params_dtype": torch.bfloat16}
        for mdm, mask_type in ((everywhere, AttnMaskType.no_mask), (hidden, AttnMaskType.padding)):
            for changes in ({}, fp8):
                model = build(mdm, transformer_impl="transformer_engine", **changes)
                for layer in model.decoder.layers:
                    assert layer.self_attention.attn_mask_type == mask_type
                    assert "TE" in type(layer.self_attention.core_attention).__name__
        isolated = build(MDMConfig(isolate_documents=True), transformer_impl="transformer_engine")
        assert keys(isolated) == keys(te)
        blocks = build(MDMConfig(block_size=4), transformer_impl="transformer_engine")
        assert keys(blocks) == keys(te)
        _attention_of_hybrid_layers(blocks.config)
        _attention_in_documents(isolated.decoder.layers[0].self_attention.core_attention)
        attention = blocks.decoder.layers[0].self_attention.core_attention
        _attention_in_documents(attention)  # of phases with whole rows
        _attention_in_blocks(attention, blocks)
        Path(os.environ["TRACE_DIR"], "built").write_text("done")
        torch.distributed.destroy_process_group()


def _attention_in_documents(attention) -> None:
    """Checks what our layer asks of Transformer Engine: full attention inside each document."""
    from transformer_engine.pytorch import DotProductAttention

    asked = []

    def forward(self, query, key, value, attention_mask=None, **flags):
        """Attention in plain torch. Shapes are [s, b, heads, d] or, with bounds, [t, heads, d]."""
        asked.append(flags)
        assert attention_mask is None
        repeat = query.shape[-2] // key.shape[-2]
        q, k, v = query, *(x.repeat_interleave(repeat, dim=-2) for x in (key, value))
        if "qkv_format" not in flags:
            parts = [tuple(x.permute(1, 2, 0, 3) for x in (q, k, v))]
        else:
            bounds = flags["cu_seqlens_q"].tolist()
            pairs = list(itertools.pairwise(bounds))
            assert max(high - low for low, high in pairs) <= flags["max_seqlen_q"]
            parts = [[x[a:b].transpose(0, 1)[None] for x in (q, k, v)] for a, b in pairs]
        seen = [torch.nn.functional.scaled_dot_product_attention(*part) for part in parts]
        if "qkv_format" not in flags:
            return seen[0].permute(2, 0, 1, 3).flatten(2)
        return torch.cat([x[0].transpose(0, 1) for x in seen]).flatten(1)

    DotProductAttention.forward = forward
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(8, 2, 4, 16, generator=generator)
    k, v = torch.randn(2, 8, 2, 2, 16, generator=generator)
    bounds = torch.tensor([0, 3, 8, 16], dtype=torch.int32)
    inside = attention(q, k, v, bounds, packed_seq_params=None, attention_bias=None)
    assert asked[-1]["qkv_format"] == "thd" and asked[-1]["attn_mask_type"] == "padding"
    parts = [(0, 0, 3), (0, 3, 8), (1, 0, 8)]
    for row, low, high in parts:
        one = [x[low:high, row : row + 1] for x in (q, k, v)]
        alone = attention(*one, None, packed_seq_params=None, attention_bias=None)
        assert asked[-1]["attn_mask_type"] == "no_mask"
        torch.testing.assert_close(inside[low:high, row : row + 1], alone)


def _attention_of_hybrid_layers(config) -> None:
    """Checks that HybridModel's layers get the same attention, and Megatron's own spec stays."""
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    from megatron_mdm.config import MDMConfig
    from megatron_mdm.mcore.model.hybrid import bidirectional_stack
    from megatron_mdm.mcore.model.te_attention import BlockAttention

    def core(stack):
        layer = stack.submodules.attention_layer.submodules
        return layer.self_attention.submodules.core_attention

    before = core(hybrid_stack_spec)
    assert core(bidirectional_stack(config, MDMConfig(block_size=4))) is BlockAttention
    assert core(hybrid_stack_spec) is before and before is not BlockAttention


def _attention_in_blocks(attention, model) -> None:
    """Checks what our layer asks of Transformer Engine for rows with noisy and clean tokens."""
    import inspect

    from transformer_engine.pytorch import DotProductAttention

    from megatron_mdm.config import MDMConfig
    from megatron_mdm.errors import UserError
    from megatron_mdm.mcore.model.inputs import ModelInputs
    from megatron_mdm.mcore.model.te_attention import NO_KERNEL
    from megatron_mdm.objective.blocks import BlockRows

    asked = []

    def forward(self, query, key, value, attention_mask=None, **flags):
        """Attention with a bias in plain torch. Shapes are [s, b, heads, d]."""
        asked.append(flags)
        assert attention_mask is None
        repeat = query.shape[-2] // key.shape[-2]
        k, v = (x.repeat_interleave(repeat, dim=-2) for x in (key, value))
        q, k, v = (x.permute(1, 2, 0, 3).float() for x in (query, k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5 + flags["core_attention_bias"].float()
        return (scores.softmax(dim=-1) @ v).permute(2, 0, 1, 3).flatten(2)

    documents = torch.tensor([[0] * 6 + [1] * 6, [0] * 12])
    rows, clean = BlockRows(documents, 4, views=2), torch.arange(24).view(2, 12)
    hidden = rows.hidden()
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16):
        model.config.params_dtype = dtype
        DotProductAttention.forward = forward
        mask = ModelInputs.of_blocks(clean, rows, MDMConfig(), 1, model).attention_mask
        q = torch.randn(36, 2, 4, 16, generator=generator).to(dtype)
        k, v = torch.randn(2, 36, 2, 2, 16, generator=generator).to(dtype)
        found = attention(q, k, v, mask, packed_seq_params=None, attention_bias=None)
        flags = asked[-1]
        assert flags["attn_mask_type"] == "no_mask" and "qkv_format" not in flags
        assert flags["core_attention_bias_type"] == "post_scale_bias"
        bias = flags["core_attention_bias"]
        assert bias is mask, "all layers share one tensor"
        assert bias.shape == (2, 1, 36, 36) and bias.dtype == dtype and not bias.requires_grad
        assert torch.equal(bias != 0, hidden) and bias[hidden].unique().numel() == 1
        heads = (x.repeat_interleave(4 // x.shape[2], dim=2) for x in (q, k, v))
        heads = [x.permute(1, 2, 0, 3).float() for x in heads]
        seen = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=~hidden)
        torch.testing.assert_close(found, seen.permute(2, 0, 1, 3).flatten(2))

    def refuse(words):
        def fail(self, *_, **__):
            raise ValueError(words)

        return fail

    DotProductAttention.forward = refuse(f"{NO_KERNEL} for the provided inputs.")
    with pytest.raises(UserError, match="use --attention-backend unfused"):
        attention(q, k, v, mask)
    DotProductAttention.forward = refuse("another error")
    with pytest.raises(ValueError, match="^another error$"):
        attention(q, k, v, mask)
    assert NO_KERNEL in inspect.getsource(inspect.getmodule(DotProductAttention))


def test_the_spec_builds_bidirectional_with_the_local_keys(tmp_path):
    ranks.launch(tmp_path, 1, entry=transformer_engine_spec, transformer_engine=True)
    assert (Path(tmp_path) / "built").read_text() == "done"


def flags_of_blocks() -> None:
    """Parses the flags as the program does, and builds the model's configuration."""
    from megatron.core.transformer.enums import AttnBackend

    from megatron_mdm.config import MDMConfig
    from megatron_mdm.mcore.flags.arguments import parse
    from megatron_mdm.mcore.model.builder import model_config

    with training_device("cpu"):
        args = parse()
        config = model_config(args, MDMConfig.from_args(args)).transformer
    assert config.attention_backend is AttnBackend.fused
    assert config.params_dtype is torch.bfloat16


def test_blocks_demand_the_fused_kernel(tmp_path):
    flags = "--mock-data --mdm-block-size 4 --transformer-impl transformer_engine --bf16".split()
    run = ranks.launch(tmp_path, 1, *flags, entry=flags_of_blocks, transformer_engine=True)
    assert "blocks with Transformer Engine: --attention-backend fused" in run.output[0]
