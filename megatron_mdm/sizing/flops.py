"""Useful floating-point operations of training: the numerator of model FLOPs utilisation (MFU).

Only matrix products count; a multiplication with its addition counts as two operations. Norms,
activations, softmax, embeddings and the optimizer do not count, as in PaLM's MFU (arXiv 2204.02311,
appendix B). A backward pass counts twice as much as its forward pass. Redundant work does not
count: recomputed activations, padding, logits at positions that are not masked, and, with causal
attention, scores of later positions.
"""

from argparse import Namespace
from dataclasses import dataclass

# Megatron arguments that change the sizes of layers but are not supported here.
UNKNOWN = ("moe_latent_size", "attention_output_gate", "multi_latent_attention")

BACKWARD = 2  # matrix products of the backward pass per matrix product of the forward pass


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a transformer, with the names of Megatron's flags.

    Attributes:
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        ffn_hidden_size: width of the feed-forward layer.
        num_attention_heads: query heads.
        vocab_size: size of the vocabulary in the output layer, padding included.
        seq_length: number of positions of a row.
        num_query_groups: key and value heads; None: one for each query head.
        kv_channels: width of a head; None: hidden_size / num_attention_heads.
        gated: whether the feed-forward layer has a gate (SwiGLU), and therefore three matrices.
        tied: whether embedding and output layer share their weights.
        num_experts: experts of a mixture-of-experts layer; 0: all layers are dense.
        moe_router_topk: experts that process each token.
        moe_ffn_hidden_size: width of an expert; None: ffn_hidden_size.
        moe_shared_expert_size: width of the shared expert, which processes every token; 0: none.
        num_moe_layers: number of layers with experts; None: all layers, if there are experts.
        num_dense_layers: number of feed-forward layers without experts; None: the other layers.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    vocab_size: int
    seq_length: int
    num_query_groups: int | None = None
    kv_channels: int | None = None
    gated: bool = True
    tied: bool = False
    num_experts: int = 0
    moe_router_topk: int = 0
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_size: int = 0
    num_moe_layers: int | None = None
    num_dense_layers: int | None = None

    @classmethod
    def from_args(cls, args: Namespace) -> "ModelShape":
        """Reads the sizes from Megatron's validated arguments; ignores those in `UNKNOWN`."""
        experts = args.num_experts or 0
        pattern = args.hybrid_layer_pattern
        frequency = args.moe_layer_freq
        if isinstance(frequency, int):
            frequency = [int(i % frequency == 0) for i in range(args.num_layers)]
        moe_layers = pattern.count("E") if pattern else sum(frequency)
        return cls(
            num_layers=pattern.count("*") if pattern else args.num_layers,
            hidden_size=args.hidden_size,
            ffn_hidden_size=args.ffn_hidden_size,
            num_attention_heads=args.num_attention_heads,
            vocab_size=args.padded_vocab_size,
            seq_length=args.seq_length,
            num_query_groups=args.num_query_groups if args.group_query_attention else None,
            kv_channels=args.kv_channels,
            gated=args.swiglu,
            tied=not args.untie_embeddings_and_output_weights,
            num_experts=experts,
            moe_router_topk=args.moe_router_topk if experts else 0,
            moe_ffn_hidden_size=args.moe_ffn_hidden_size if experts else None,
            moe_shared_expert_size=(args.moe_shared_expert_intermediate_size or 0)
            if experts
            else 0,
            num_moe_layers=moe_layers if experts else None,
            num_dense_layers=pattern.count("-") if pattern else None,
        )

    @property
    def _head_width(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def _attention_weights(self) -> int:
        """Weights of one layer's query, key, value and output projections of attention."""
        groups = self.num_query_groups or self.num_attention_heads
        return 2 * self.hidden_size * self._head_width * (self.num_attention_heads + groups)

    @property
    def _moe_layers(self) -> int:
        if not self.num_experts:
            return 0
        return self.num_layers if self.num_moe_layers is None else self.num_moe_layers

    def _feed_forward_weights(self, experts: int) -> int:
        """Weights of all feed-forward matrices, with `experts` experts in each MoE layer."""
        matrices = 3 if self.gated else 2
        moe = self._moe_layers
        others = self.num_layers - moe if self.num_dense_layers is None else self.num_dense_layers
        dense = others * self.ffn_hidden_size
        width = experts * (self.moe_ffn_hidden_size or self.ffn_hidden_size)
        shared = moe * (width + self.moe_shared_expert_size)
        router = moe * self.hidden_size * self.num_experts
        return matrices * self.hidden_size * (dense + shared) + router

    @property
    def num_parameters(self) -> int:
        """Number of weights in all matrices, embeddings included, without norms and biases."""
        embeddings = (1 if self.tied else 2) * self.hidden_size * self.vocab_size
        layers = self.num_layers * self._attention_weights
        return embeddings + layers + self._feed_forward_weights(self.num_experts)

    def forward_flops(self, head_fraction: float = 1.0, causal: bool = False) -> float:
        """Operations of a forward pass, per token of a row.

        Args:
            head_fraction: fraction of positions whose logits are needed. For masked diffusion these
                are the masked positions, on average half of them with uniform rates. 1 for an
                autoregressive model.
            causal: whether attention is causal. A position then attends to (seq_length + 1) / 2
                positions on average, else to all positions.
        """
        seen = (self.seq_length + 1) / 2 if causal else self.seq_length
        return self._forward(1, seen, head_fraction)

    def _forward(self, positions: float, pairs: float, logits: float) -> float:
        weights = self.num_layers * self._attention_weights
        weights += self._feed_forward_weights(self.moe_router_topk)
        scores = 2 * self.num_layers * self.num_attention_heads * self._head_width
        head = self.hidden_size * self.vocab_size
        return 2 * (weights * positions + scores * pairs + head * logits)

    def training_flops(self, head_fraction: float = 1.0, causal: bool = False) -> float:
        """Operations of a forward and a backward pass, per token; see `forward_flops`."""
        return (1 + BACKWARD) * self.forward_flops(head_fraction, causal)

    def training_flops_of(self, positions: int, pairs: int, logits: int) -> float:
        """Operations of a forward and a backward pass over rows of any lengths.

        Args:
            positions: number of tokens that the layers process.
            pairs: number of pairs of positions of which the first attends to the second; a position
                also forms a pair with itself.
            logits: number of positions whose logits are needed.
        """
        return (1 + BACKWARD) * self._forward(positions, pairs, logits)


def mfu(flops_per_token: float, tokens_per_s: float, peak_flops: float) -> float:
    """Model FLOPs utilisation: useful operations per second divided by the peak of the devices.

    Args:
        flops_per_token: see `ModelShape.training_flops`.
        tokens_per_s: tokens per second on all devices together.
        peak_flops: dense peak operations per second of all devices together, in the precision of
            training.
    """
    return flops_per_token * tokens_per_s / peak_flops
