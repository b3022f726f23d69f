"""A plain training loop on a Hugging Face model, as a user might write it without Megatron.

The loop follows LLaDA's released recipe: a uniform rate t for each row, Bernoulli masks with
p = (1 - eps) t + eps, logits at all positions, cross entropies of masked tokens weighted by 1/p,
AdamW, and gradients clipped at 1. The model is transformers' Llama with bidirectional attention
(torch's scaled_dot_product_attention). On CUDA the loop runs under autocast to bfloat16.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.python_text import MASK
from benchmarks.sides import ffn_size

EPS = 1e-3


class PlainLoop:
    """The training loop, one step at a time.

    Args:
        sizes: the size of each of `sides.SIZES`.
        vocabulary: number of rows of the embedding.
        device: `cuda` or `cpu`.
    """

    def __init__(self, sizes: dict[str, int], vocabulary: int, device: str) -> None:
        self.device = device
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=sizes["hidden"],
                intermediate_size=ffn_size(sizes["hidden"], device),
                num_hidden_layers=sizes["layers"],
                num_attention_heads=sizes["heads"],
                max_position_embeddings=sizes["length"],
                tie_word_embeddings=False,
                use_cache=False,
            )
        ).to(device)
        for layer in self.model.model.layers:
            layer.self_attn.is_causal = False
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1
        )

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the loss of LLaDA's pretraining on clean tokens [b, s], in nats per token."""
        b, s = tokens.shape
        t = torch.rand(b, device=self.device)
        p = ((1 - EPS) * t + EPS)[:, None].expand(b, s)
        mask = torch.rand(b, s, device=self.device) < p
        logits = self.model(torch.where(mask, MASK, tokens)).logits
        losses = torch.nn.functional.cross_entropy(logits[mask], tokens[mask], reduction="none")
        return (losses / p[mask]).sum() / (b * s)

    def step(self, tokens: torch.Tensor) -> None:
        """Takes one optimizer step on clean tokens [b, s]."""
        tokens = tokens.to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = self.loss(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
