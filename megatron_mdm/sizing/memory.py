"""Estimates the GPU memory of a rank from the flags; it measures nothing.

    weights, gradients,  in bfloat16, 6 bytes for each parameter of the rank (weight 2, float32
    optimizer            gradient 4), and 12 for the master weight and the moments, with the
                         distributed optimizer divided by the number of ranks that share them
    activations          layers x tokens of a micro-batch x bytes of a layer / tensor ranks /
                         context ranks x micro-batches in flight
    mask of blocks       texts of a micro-batch x positions^2 x 2 / context ranks x micro-batches in
                         flight; under context parallelism x layers, unless they are recomputed
    head                 masked tokens of a micro-batch x (vocabulary x 6 / tensor ranks + 4 h):
                         logits in bfloat16 and in float32 for the cross entropy; the hidden states
                         at masked positions, gathered from all tensor ranks, and their gradient

The estimate assumes 16-bit activations, fused attention, and sequence parallelism together with
tensor parallelism. With --recompute-granularity full, a recomputed layer keeps only its input, and
the layers that are recomputed together exist once more. Selective recomputation is not subtracted.

For each token, a layer keeps the following numbers of 2 bytes each. h is the hidden size, q the
width of all query heads, k the width of all key heads, f the width of the feed-forward layer:

    norms and their inputs   4 h      queries, keys, values, result   2 q + 2 k
    feed-forward layer       3 f if it has a gate (gate, up, their product), else 2 f
    experts                  top-k (3 f + 2 h): the same for each expert, and its input and output

Workspaces, communication buffers, memory fragmentation and the CUDA context (some GiB) are not
included.
"""

from argparse import Namespace
from dataclasses import dataclass

from megatron_mdm.config import MDMConfig
from megatron_mdm.sizing.flops import ModelShape
from megatron_mdm.sizing.pipeline import micro_batches_in_flight

GIB = 2**30
LOGIT_BYTES = 2 + 4
MOMENT_BYTES = 4 + 4  # of Adam, float32


@dataclass(frozen=True)
class Stage:
    """Contents of a rank of a pipeline stage.

    Attributes:
        dense: parameters that all data-parallel and context-parallel ranks share.
        experts: parameters of experts.
        layers: layers without experts.
        moe_layers: layers with experts.
        has_head: whether the stage ends with the output layer.
    """

    dense: int
    experts: int
    layers: int
    moe_layers: int
    has_head: bool


def layer_bytes_per_token(shape: ModelShape, experts: bool = False) -> int:
    """Bytes that one layer keeps per token for the backward pass, on all tensor ranks together.

    Args:
        shape: sizes of the model.
        experts: whether the layer has experts.
    """
    head_width = shape.kv_channels or shape.hidden_size // shape.num_attention_heads
    queries = shape.num_attention_heads * head_width
    keys = (shape.num_query_groups or shape.num_attention_heads) * head_width
    matrices = 3 if shape.gated else 2
    if experts:
        width = shape.moe_ffn_hidden_size or shape.ffn_hidden_size
        feed_forward = shape.moe_router_topk * (matrices * width + 2 * shape.hidden_size)
        feed_forward += matrices * shape.moe_shared_expert_size
    else:
        feed_forward = matrices * shape.ffn_hidden_size
    return 2 * (4 * shape.hidden_size + 2 * queries + 2 * keys + feed_forward)


def bytes_of_stage(
    args: Namespace, stage: Stage, index: int, micro_batches: int
) -> dict[str, float]:
    """Expected bytes on a rank of a pipeline stage, by purpose.

    Args:
        args: Megatron's validated arguments.
        stage: what a rank of the stage holds.
        index: number of the stage, from 0.
        micro_batches: micro-batches of a step.

    Returns:
        Bytes of `weights`, `gradients`, `optimizer`, `activations` and `head`.
    """
    parameters = stage.dense + stage.experts
    is_half = args.bf16 or args.fp16
    weight = 2 if is_half else 4
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 else weight
    master = 4 if is_half else 0
    state = master + MOMENT_BYTES
    if args.use_precision_aware_optimizer:
        gradient = args.main_grads_dtype.itemsize
        moments = args.exp_avg_dtype.itemsize + args.exp_avg_sq_dtype.itemsize
        state = moments + (args.main_params_dtype.itemsize if is_half else 0)
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    experts = args.expert_model_parallel_size * args.expert_tensor_parallel_size
    shares, expert_shares = args.world_size // model, 1
    if stage.experts:
        expert_shares = args.world_size // (experts * args.pipeline_model_parallel_size)
    if args.use_distributed_optimizer:
        instances = args.num_distributed_optimizer_instances
        optimizer = stage.dense / (shares / instances) + stage.experts / (expert_shares / instances)
    else:
        optimizer = parameters
    return {
        "weights": parameters * weight,
        "gradients": parameters * gradient,
        "optimizer": optimizer * state,
        "activations": _activation_bytes(
            args,
            stage.layers,
            stage.moe_layers,
            micro_batches_in_flight(args, index, micro_batches),
        ),
        "head": _head_bytes(args) if stage.has_head else 0.0,
    }


def expected_bytes(args: Namespace) -> dict[str, float]:
    """Expected bytes of `state`, `activations` and `head` on the rank with the most of them.

    The state is counted by Megatron, from the flags alone. With pipeline parallelism the
    activations are those of as many micro-batches in flight as stages: the first rank then holds as
    many as a rank with all layers.

    Args:
        args: Megatron's validated arguments.
    """
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

    shape = ModelShape.from_args(args)
    moe = shape.num_moe_layers or 0
    return {
        "state": compute_weight_and_optimizer_memory(args),
        "activations": _activation_bytes(args, shape.num_layers - moe, moe, 1.0),
        "head": _head_bytes(args),
    }


def _tokens(args: Namespace) -> float:
    """Tokens of a micro-batch on a context-parallel rank."""
    return float(args.micro_batch_size * args.seq_length / args.context_parallel_size)


def _has_copies(mdm: MDMConfig) -> bool:
    """Whether any phase has blocks, whose rows hold noisy and clean tokens."""
    return mdm.blocks is not None and any(size is not None for size in mdm.blocks.sizes)


def _positions(args: Namespace) -> float:
    """Positions of a micro-batch on a context-parallel rank, with the copies that blocks need."""
    mdm = MDMConfig.from_args(args)
    return _tokens(args) * ((mdm.views + 1) / mdm.views if _has_copies(mdm) else 1.0)


def _mask_bytes(args: Namespace, layers: int, in_flight: float) -> float:
    """Bytes of the attention masks of blocks, as Transformer Engine's biases, for their backward.

    Layers share the mask of a micro-batch. Ring attention copies it, in each layer.
    """
    mdm = MDMConfig.from_args(args)
    if not (_has_copies(mdm) and layers):
        return 0.0
    copied = args.context_parallel_size > 1 and args.recompute_granularity is None
    row = (mdm.views + 1) * args.seq_length
    of_batch = 2 * args.micro_batch_size / mdm.views * row**2 / args.context_parallel_size
    return float(of_batch * in_flight * (layers if copied else 1))


def _activation_bytes(args: Namespace, layers: int, moe_layers: int, in_flight: float) -> float:
    """Bytes that layers keep for the backward pass.

    Args:
        args: Megatron's validated arguments.
        layers: layers without experts.
        moe_layers: layers with experts.
        in_flight: micro-batches whose backward pass has not begun.
    """
    shape = ModelShape.from_args(args)
    dense, moe = layer_bytes_per_token(shape), layer_bytes_per_token(shape, experts=True)
    total = layers + moe_layers
    kept = layers * dense + moe_layers * moe
    whole = in_flight * kept
    if args.recompute_granularity == "full" and total:
        mean, inputs = kept / total, 2 * args.hidden_size
        of_pairs = 2 if args.hybrid_layer_pattern else 1  # HybridModel counts attention and MLP
        group = min(max((args.recompute_num_layers or 1) // of_pairs, 1), total)
        if args.recompute_method == "block":  # the first `group` layers are recomputed one by one
            whole = in_flight * (group * inputs + (total - group) * mean) + mean
        else:
            whole = in_flight * inputs * -(-total // group) + group * mean
    of_layers = _positions(args) * whole / args.tensor_model_parallel_size
    return float(of_layers + _mask_bytes(args, layers + moe_layers, in_flight))


def _head_bytes(args: Namespace) -> float:
    """Bytes of the head if all tokens of a micro-batch are masked."""
    logits = args.padded_vocab_size * LOGIT_BYTES / args.tensor_model_parallel_size
    return float(_tokens(args) * (logits + 2 * 2 * args.hidden_size))
