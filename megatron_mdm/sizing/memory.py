"""Estimates the GPU memory of a rank from the flags; it measures nothing.

    weights, gradients,  as Megatron counts them: in bfloat16, 6 bytes for each parameter of the
    optimizer            rank (weight 2, float32 gradient 4), and 12 for the master weight and the
                         moments, divided by the number of data-parallel ranks
    activations          layers x tokens of a micro-batch x bytes of a layer / tensor ranks
    logits               masked tokens of a micro-batch x vocabulary x 6 / tensor ranks: 2 bytes in
                         bfloat16, and 4 in float32 for the cross entropy

The estimate assumes 16-bit activations, fused attention, sequence parallelism together with tensor
parallelism, and no activation recomputation. With pipeline parallelism it assumes as many
micro-batches in flight as stages; a rank then holds as many activations as a rank with all layers.

For each token, a layer keeps the following numbers of 2 bytes each. h is the hidden size, q the
width of all query heads, k the width of all key heads, f the width of the feed-forward layer:

    norms and their inputs   4 h      queries, keys, values, result   2 q + 2 k
    feed-forward layer       3 f if it has a gate (gate, up, their product), else 2 f
    experts                  top-k (3 f + 2 h): the same for each expert, and its input and output

Workspaces, communication buffers, memory fragmentation and the CUDA context (some GiB) are not
included.
"""

from argparse import Namespace

from megatron_mdm.sizing.flops import ModelShape

GIB = 2**30
LOGIT_BYTES = 2 + 4


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


def expected_bytes(args: Namespace, head_fraction: float = 1.0) -> dict[str, float]:
    """Expected bytes of `state`, `activations` and `logits` on the rank with the most of them.

    Args:
        args: Megatron's validated arguments.
        head_fraction: fraction of masked tokens in the micro-batch with the most of them.
    """
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

    shape = ModelShape.from_args(args)
    tokens = args.micro_batch_size * args.seq_length
    moe = shape.num_moe_layers or 0
    layers = (shape.num_layers - moe) * layer_bytes_per_token(shape)
    layers += moe * layer_bytes_per_token(shape, experts=True)
    parallel = args.tensor_model_parallel_size
    return {
        "state": compute_weight_and_optimizer_memory(args),
        "activations": tokens * layers / parallel,
        "logits": head_fraction * tokens * shape.vocab_size * LOGIT_BYTES / parallel,
    }
