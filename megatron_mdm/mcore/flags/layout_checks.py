"""Checks that ranks, model and batch can be divided as the flags say, and refuses in one line.

Megatron would find some of these errors only in the first step, and end every rank with a
traceback.
"""

import os
from argparse import Namespace

from megatron_mdm.config import flag
from megatron_mdm.errors import UserError
from megatron_mdm.sizing.nodes import Layout


def check_sizes(args: Namespace) -> None:
    """Checks that ranks, rows and positions can be divided as the flags say.

    Args:
        args: parsed arguments. Values that Megatron derives are checked only after it has validated
            the arguments.

    Raises:
        UserError: names the flags.
    """
    _check_head_size(args)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
    ):
        if getattr(args, name) < 1:
            raise UserError(f"{flag(name)} must be at least 1, got {getattr(args, name)}")
    layout = Layout.from_args(args)
    model, experts = layout.replica, layout.expert_replica
    if world % model:
        raise UserError(
            f"{world} ranks cannot be divided into model replicas of {model} "
            f"(--tensor-model-parallel-size {args.tensor_model_parallel_size} x "
            f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size} x "
            f"--context-parallel-size {args.context_parallel_size}): change "
            "--nproc-per-node or the sizes"
        )
    if world % experts:
        raise UserError(
            f"{world} ranks cannot be divided into expert replicas of {experts} ranks: change "
            "--nproc-per-node, --expert-model-parallel-size or --expert-tensor-parallel-size"
        )
    parts = args.tensor_model_parallel_size * args.context_parallel_size
    is_cut = args.sequence_parallel and args.tensor_model_parallel_size > 1
    if is_cut and (args.seq_length or 0) % parts:
        raise UserError(
            f"--sequence-parallel cuts rows into {parts} parts (--tensor-model-parallel-size x "
            f"--context-parallel-size): --seq-length {args.seq_length} must be a multiple of it"
        )
    if args.micro_batch_size is None:
        raise UserError("--micro-batch-size is missing: rows that one rank processes at a time")
    replicas = world // model
    for prefix in ("", "eval_"):
        micro = getattr(args, f"{prefix}micro_batch_size") or args.micro_batch_size
        total = getattr(args, f"{prefix}global_batch_size") or args.global_batch_size
        if micro < 1:
            raise UserError(f"{flag(prefix + 'micro_batch_size')} must be at least 1, got {micro}")
        if not prefix and micro % args.mdm_views:
            raise UserError(
                f"--micro-batch-size {micro} is not a multiple of --mdm-views {args.mdm_views}: "
                "the views of a text must lie in one micro-batch"
            )
        if not prefix and args.step_batch_size_schedule:
            total = None  # a placeholder that Megatron derives; the schedule sets the sizes
        if total is None:
            continue
        if total < 1 or total % (micro * replicas):
            raise UserError(
                f"{flag(prefix + 'global_batch_size')} {total} is not a multiple of "
                f"{flag(prefix + 'micro_batch_size')} {micro} x {replicas} data-parallel ranks"
            )
        if not prefix or args.eval_iters:
            name = f"{flag(prefix + 'global_batch_size')} {total}"
            _check_virtual_stages(args, name, total // (micro * replicas))
    for entry in (args.step_batch_size_schedule or "").replace(",", " ").split():
        size = entry.rpartition(":")[2]
        if not size.isdigit():  # Megatron reports it
            continue
        name = f"--step-batch-size-schedule: {size} of {entry}"
        if int(size) % (args.micro_batch_size * replicas):
            raise UserError(
                f"{name} is not a multiple of --micro-batch-size {args.micro_batch_size} x "
                f"{replicas} data-parallel ranks"
            )
        _check_virtual_stages(args, name, int(size) // (args.micro_batch_size * replicas))


def _check_virtual_stages(args: Namespace, name: str, micro_batches: int) -> None:
    """Checks a number of micro-batches against the rule of Megatron's interleaved schedule.

    Args:
        args: parsed arguments.
        name: the flag that gives the number, with its value.
        micro_batches: number of micro-batches of a data-parallel rank in a step.
    """
    # Megatron derives this value when it validates the arguments.
    if not getattr(args, "virtual_pipeline_model_parallel_size", None):
        return
    stages = args.pipeline_model_parallel_size
    group = args.microbatch_group_size_per_vp_stage or stages
    left = micro_batches % group
    if micro_batches < group or 0 < left < stages:
        raise UserError(
            f"{name} makes {micro_batches} micro-batches a rank, which virtual stages cannot "
            f"process: they take one or more full groups of {group}, and then at most one smaller "
            f"group, of at least {stages} (--pipeline-model-parallel-size)"
        )


def head_size(args: Namespace) -> int:
    """Channels of an attention head; 0 if no flag sets it yet."""
    heads = args.num_attention_heads
    return int(args.kv_channels or ((args.hidden_size or 0) // heads if heads else 0))


def _check_head_size(args: Namespace) -> None:
    size, rotated = head_size(args), 1.0 if args.rotary_percent is None else args.rotary_percent
    if args.position_embedding_type == "rope" and size and int(size * rotated) % 2:
        raise UserError(
            f"--position-embedding-type rope rotates pairs of channels: {int(size * rotated)} of a "
            "head (--kv-channels, by default --hidden-size / --num-attention-heads, times "
            "--rotary-percent) must be even"
        )


def check_experts(args: Namespace) -> None:
    """Checks the flags that --num-experts depends on.

    Args:
        args: parsed arguments.

    Raises:
        UserError: names the flags.
    """
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        raise UserError(
            "--num-experts with --tensor-model-parallel-size above 1 needs --sequence-parallel"
        )
    if args.moe_router_topk > args.num_experts:
        raise UserError(
            f"--moe-router-topk {args.moe_router_topk} exceeds --num-experts {args.num_experts}"
        )
    if "sinkhorn" in args.moe_router_load_balancing_type:  # a word, or a list of them
        raise UserError(
            "--moe-router-load-balancing-type sinkhorn makes the routing of a row depend on the "
            "other rows in its micro-batch: use seq_aux_loss"
        )
    balances_quantiles = "quantile_balancing" in args.moe_router_load_balancing_type
    if balances_quantiles and args.mdm_random_length_fraction:
        raise UserError(
            "--moe-router-load-balancing-type quantile_balancing does not go with "
            "--mdm-random-length-fraction: Megatron cannot exclude positions after the end of a row"
        )
