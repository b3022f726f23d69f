"""What a rank needs of GPU memory, expected from the flags; an estimate, not a measurement.

    weights, gradients,  as Megatron counts them: 6 bytes for each of the rank's parameters in
    optimizer            bfloat16 (weight 2, float32 gradient 4), and 12 for master weight and
                         moments, divided by the data-parallel ranks
    activations          layers x tokens of a micro-batch x bytes of a layer / tensor ranks
    logits               masked tokens of a micro-batch x vocabulary x 6 / tensor ranks: bfloat16,
                         and float32 in the cross entropy

with 16-bit activations, fused attention, sequence parallelism wherever there is tensor parallelism,
nothing recomputed and, under pipeline parallelism, as many micro-batches in flight as stages, so
that a rank keeps as much as one with all layers. A layer keeps of a token, at 2 bytes a number and
with widths h, q of all query heads, k of keys and values, f of the feed-forward layer:

    norms and their inputs   4 h      queries, keys, values, result   2 q + 2 k
    feed-forward layer       3 f if it has a gate (gate, up, their product), else 2 f
    experts                  top-k (3 f + 2 h): the same, and what goes into each and comes out

Workspaces, communication buffers, fragments and the CUDA context (some GiB) come on top.
"""

from argparse import Namespace

from megatron_mdm.sizing.flops import ModelShape

GIB = 2**30
LOGIT_BYTES = 2 + 4


def layer_bytes_per_token(shape: ModelShape, experts: bool = False) -> int:
    """Bytes that one layer keeps of a token for the backward pass, over all tensor ranks.

    Args:
        shape: of the model.
        experts: whether it is a layer with experts.
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
    """Bytes of the most loaded rank, by what they are for.

    Args:
        args: Megatron's arguments, validated.
        head_fraction: of the tokens of the fullest micro-batch that are masked.
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
