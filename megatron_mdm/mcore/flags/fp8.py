"""Checks that the model, the GPU and the checkpoint allow the FP8 flags."""

import os
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch

from megatron_mdm.config import MDMConfig
from megatron_mdm.errors import UserError
from megatron_mdm.libraries import fp8_obstacle
from megatron_mdm.mcore.flags.layout_checks import head_size
from megatron_mdm.versions import release

# Read by Transformer Engine 2.16.1, 2.17.1 and from 2.18 on; others read the pickle in any case.
UNSAFE_PICKLES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
SIZE_MULTIPLE = 16  # FP8 products need multiples of it: rows, and both dimensions of a weight


def check_fp8(args: Namespace) -> None:
    """Checks that --fp8-format can work here. Transformer Engine is known to be installed.

    Args:
        args: parsed arguments, before or after Megatron validates them.

    Raises:
        UserError: the device or the layers do not support it, or a size is not a multiple of 16.
    """
    if not args.fp8:
        return
    if args.mdm_device == "cpu":
        raise UserError("--fp8-format needs a GPU: leave it out with --mdm-device cpu")
    check_fp8_flags(args)
    here = (torch.cuda.get_device_capability(), release(torch.version.cuda or "0"))
    obstacle = fp8_obstacle(args.fp8_recipe, *here)
    if obstacle:
        raise UserError(
            f"--fp8-format with --fp8-recipe {args.fp8_recipe} {obstacle}: use --bf16 alone"
            + ("" if fp8_obstacle("delayed", *here) else ", or --fp8-recipe delayed")
        )


def check_fp8_flags(args: Namespace) -> None:
    """Checks what --fp8-format needs of other flags, on any machine.

    Args:
        args: parsed arguments, before or after Megatron validates them.

    Raises:
        UserError: the layers do not support it, or a size is not a multiple of 16.
    """
    if not args.fp8:
        return
    if args.transformer_impl != "transformer_engine":
        raise UserError(
            f"--fp8-format does nothing in the layers of --transformer-impl {args.transformer_impl}"
            ": use --transformer-impl transformer_engine, or leave it out"
        )
    if args.use_transformer_engine_op_fuser and args.fp8_recipe == "delayed":
        raise UserError(
            "--use-transformer-engine-op-fuser keeps the scales of --fp8-recipe delayed in a place "
            "where evaluations would change them: leave it out, or use --fp8-recipe tensorwise"
        )
    for name, size, parts in _sizes(args):
        if size % (SIZE_MULTIPLE * parts):
            shares = f" ({SIZE_MULTIPLE} for each of {parts} ranks)" if parts > 1 else ""
            raise UserError(
                f"--fp8-format: {name} must be a multiple of {SIZE_MULTIPLE * parts}{shares}, got "
                f"{size}"
            )


def _sizes(args: Namespace) -> Iterator[tuple[str, int, int]]:
    """(flags, size, ranks that share it) of each size in FP8 products; 0 if no flag sets it."""
    tensor, heads = args.tensor_model_parallel_size, args.num_attention_heads or 0
    length, views = args.seq_length or 0, args.mdm_views
    rows = (args.micro_batch_size or 0) * length
    parts = args.context_parallel_size * (tensor if args.sequence_parallel else 1)
    yield "--micro-batch-size x --seq-length", rows, parts
    if MDMConfig.from_args(args).blocks is not None:
        texts = (args.micro_batch_size or 0) // views
        name = "--micro-batch-size / --mdm-views x (--mdm-views + 1) x --seq-length of blocks"
        yield name, texts * (views + 1) * length, parts
    yield "--hidden-size", args.hidden_size or 0, 1
    yield "--num-attention-heads x --kv-channels", heads * head_size(args), tensor
    yield "--ffn-hidden-size", args.ffn_hidden_size or 0, tensor
    if args.num_experts:
        of_experts = args.expert_tensor_parallel_size or tensor
        yield "--moe-ffn-hidden-size", args.moe_ffn_hidden_size or 0, of_experts
        shared = args.moe_shared_expert_intermediate_size or 0
        yield "--moe-shared-expert-intermediate-size", shared, tensor


def check_scales(args: Namespace, saved: dict[str, Any], source: str | None) -> None:
    """Checks that Transformer Engine will read the scales of the checkpoint to be loaded.

    Args:
        args: arguments of this run.
        saved: arguments in the checkpoint; empty if there is none.
        source: directory of the checkpoint.

    Raises:
        UserError: the scales are a pickle, and the environment does not allow to read it.
    """
    delayed = all(x.get("fp8") and x.get("fp8_recipe") == "delayed" for x in (vars(args), saved))
    if delayed and os.environ.get(UNSAFE_PICKLES) != "1":
        raise UserError(
            f"the checkpoint in {source} has scales of --fp8-recipe delayed, which Transformer "
            f"Engine keeps as a pickle: if you trust the checkpoint, set {UNSAFE_PICKLES}=1 in the "
            "environment"
        )
