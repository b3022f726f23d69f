"""Describes the layers of the flags as a pattern of HybridModel, and checks such patterns.

In a pattern `*` is an attention layer, `-` an MLP layer and `E` a mixture of experts; `|` separates
the (virtual) pipeline stages. A layer of GPTModel is `*-` or `*E`.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from megatron_mdm.config import flag
from megatron_mdm.errors import UserError

# Megatron's layers other than `*`, `-` and `E`, and the reason why they cannot be used.
REFUSED_LAYERS = {
    "M": "a Mamba layer, which is causal",
    "G": "a gated delta net, which is causal",
    "D": "sparse attention with an indexer, which is causal",
    "+": "multi-latent attention, which is not supported",
    "/": "the beginning of multi-token prediction, which is causal",
}

# Arguments that HybridModel ignores or reads differently from GPTModel, and the reason.
_GPT_ONLY = {
    "use_rope_scaling": "Megatron passes no RoPE scaling to it, which Llama 3.1 and later need",
    "multi_latent_attention": "the plugin has no pattern for it",
    "heterogeneous_layers_config_path": "no pattern describes layers of different sizes",
    "heterogeneous_layers_config_encoded_json": "no pattern describes layers of different sizes",
    "no_rope_freq": "it counts attention layers and MLP layers together",
    "rotary_interleaved": "it computes rotary angles for the other order of channels",
    "cpu_offloading_num_layers": "only GPTModel's block of layers moves activations to the host",
    "use_te_activation_func": "its MLP layers have Megatron's activation function only",
    "use_kitchen": "its layers are Transformer Engine's or Megatron's only",
    "defer_embedding_wgrad_compute": "only GPTModel keeps the inputs of its output layer for later",
}
# Normalizations of queries and keys that only the local layers of HybridModel have.
_LOCAL_ONLY = ("qk_layernorm", "qk_l2_norm")
_POSITIONS = ("learned_absolute", "rope", "yarn", "none")

# Numbers from which the pattern follows. Megatron checks them only after it is made.
_COUNTS = (
    *("num_layers", "pipeline_model_parallel_size", "moe_layer_freq"),
    *("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"),
)

# Arguments that a pattern replaces, and their values beside it.
_REPLACED: dict[str, Any] = {
    "num_layers": None,
    "moe_layer_freq": 1,
    "num_layers_per_virtual_pipeline_stage": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "pipeline_model_parallel_layout": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
}


def model_class(args: Mapping[str, Any]) -> str:
    """The class of the model that arguments build: `gpt` or `hybrid`."""
    return "hybrid" if args.get("hybrid_layer_pattern") else "gpt"


def gpt_layers(args: Mapping[str, Any]) -> list[str]:
    """The layers of GPTModel, each as its part of a pattern: `*-`, or `*E` with experts.

    Args:
        args: arguments with --num-layers, --num-experts and --moe-layer-freq.

    Raises:
        UserError: --moe-layer-freq is a list of another length.
    """
    count, frequency = args["num_layers"], args.get("moe_layer_freq", 1)
    if not args.get("num_experts"):
        return ["*-"] * count
    if isinstance(frequency, int):
        frequency = [int(n % frequency == 0) for n in range(count)]
    if len(frequency) != count:
        raise UserError(
            f"--moe-layer-freq has {len(frequency)} entries for --num-layers {count}: give one for "
            "each layer"
        )
    return ["*E" if has_experts else "*-" for has_experts in frequency]


def describe_layers(args: Namespace) -> None:
    """Replaces --num-layers and the layout of its stages by the pattern of the same layers.

    It changes the arguments only with --mdm-model hybrid and without --hybrid-layer-pattern. Some
    flags count layers; their numbers become those of HybridModel's layers.

    Args:
        args: arguments that Megatron has parsed and not validated; changed in place.

    Raises:
        UserError: no pattern describes the layers.
        AssertionError: Megatron rejects the layout.
        ValueError: the same.
    """
    if args.mdm_model != "hybrid" or args.hybrid_layer_pattern or args.num_layers is None:
        return
    check_hybrid_model(args)
    for name in _COUNTS:
        count = getattr(args, name)
        if isinstance(count, int) and count < 1:
            raise UserError(f"{flag(name)} must be at least 1, got {count}")
    layers, stages = iter(gpt_layers(vars(args))), _stage_sizes(args)
    args.hybrid_layer_pattern = "|".join(
        "".join(next(layers) for _ in range(size)) for size in stages
    )
    vars(args).update(_REPLACED)
    counts = ["recompute_num_layers"]
    if args.first_last_layers_bf16:
        counts += ["num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"]
    for name in counts:
        if getattr(args, name) is not None:
            setattr(args, name, 2 * getattr(args, name))


def _stage_sizes(args: Namespace) -> list[int]:
    """The numbers of GPTModel's layers in the (virtual) pipeline stages, in the order of layers."""
    stages, count = args.pipeline_model_parallel_size, args.num_layers
    if args.pipeline_model_parallel_layout is not None:
        layout = PipelineParallelLayerLayout(args.pipeline_model_parallel_layout, stages)
        layout.validate_layer_layout(count, args.mtp_num_layers)
        parts = PipelineParallelLayerLayout.parse_str_to_list(args.pipeline_model_parallel_layout)
        return [part.count(LayerType.decoder) for part in parts]
    if stages < 2:
        return [count]
    chunks = args.num_virtual_stages_per_pipeline_rank
    if args.num_layers_per_virtual_pipeline_stage is not None:
        ends = args.account_for_embedding_in_pipeline_split, args.account_for_loss_in_pipeline_split
        total, size = count + sum(ends), args.num_layers_per_virtual_pipeline_stage
        if total % (stages * size):
            raise UserError(
                f"--num-layers-per-virtual-pipeline-stage {size} x --pipeline-model-parallel-size "
                f"{stages} does not divide the {total} layers"
            )
        chunks = total // (stages * size)
    chunks = None if chunks == 1 else chunks
    config = TransformerConfig(
        num_layers=count,
        hidden_size=1,
        num_attention_heads=1,
        pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks,
        num_layers_in_first_pipeline_stage=args.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=args.decoder_last_pipeline_num_layers,
        account_for_embedding_in_pipeline_split=args.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=args.account_for_loss_in_pipeline_split,
    )
    return [
        get_num_layers_to_build(config, None if chunks is None else chunk, stage)
        for chunk in range(chunks or 1)
        for stage in range(stages)
    ]


def check_model_class(args: Namespace) -> None:
    """Checks --mdm-model, --hybrid-layer-pattern and the flags that only one class has.

    Args:
        args: parsed arguments, validated or not.

    Raises:
        UserError: names the flags and what to do.
    """
    pattern = args.hybrid_layer_pattern
    if pattern and args.mdm_model == "gpt":
        if args.use_checkpoint_args:
            raise UserError(
                f"--hybrid-layer-pattern {pattern}, given or read by --use-checkpoint-args, is of "
                "HybridModel: leave out --mdm-model gpt"
            )
        raise UserError(
            f"--hybrid-layer-pattern {pattern} is of HybridModel: leave it out for --mdm-model "
            "gpt, or leave out --mdm-model"
        )
    if pattern:
        check_pattern(pattern, args.num_experts)
        check_hybrid_model(args)
    elif args.mdm_model == "hybrid" and not (args.use_checkpoint_args and args.num_layers is None):
        raise UserError(
            "--mdm-model hybrid needs --num-layers on the command line"
            + (", also with --use-checkpoint-args" if args.use_checkpoint_args else "")
        )


def check_hybrid_model(args: Namespace) -> None:
    """Checks that HybridModel obeys all flags that describe the model.

    Raises:
        UserError: names a flag that it would ignore or read differently.
    """
    for name, reason in _GPT_ONLY.items():
        if vars(args).get(name):  # some versions of Megatron lack some of them
            raise UserError(
                f"{flag(name)} does not reach HybridModel, because {reason}: use --mdm-model gpt "
                "with --num-layers"
            )
    if args.position_embedding_type not in _POSITIONS:
        raise UserError(
            f"--position-embedding-type {args.position_embedding_type} does not reach HybridModel: "
            f"use {', '.join(_POSITIONS)}, or --mdm-model gpt with --num-layers"
        )
    for name in _LOCAL_ONLY:
        if getattr(args, name) and args.transformer_impl != "local":
            raise UserError(
                f"{flag(name)} does not reach HybridModel's layers of Transformer Engine: use "
                "--mdm-model gpt with --num-layers, or --transformer-impl local"
            )


def check_pattern(pattern: str, num_experts: int | None) -> None:
    """Checks --hybrid-layer-pattern.

    Raises:
        UserError: names the symbol of a layer that cannot be used, or --num-experts is missing.
    """
    for symbol in pattern:
        if symbol not in "*-E|":
            what = REFUSED_LAYERS.get(symbol, "not a layer of Megatron's")
            raise UserError(
                f"--hybrid-layer-pattern {pattern}: {symbol} is {what}; use * (attention), - (MLP) "
                "and E (mixture of experts), with | between pipeline stages"
            )
    if "E" in pattern and not num_experts:
        raise UserError(f"--hybrid-layer-pattern {pattern} needs --num-experts for its E layers")
