r"""Trains the same network on the same rows autoregressively, with Megatron.

    python -m megatron_mdm.experiments.autoregressive --mdm-shift --mdm-device cpu --mock-data \
        --split 1,0,0 --tokenizer-type NullTokenizer --vocab-size 127 --mdm-mask-token-id 127 \
        --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 \
        --max-position-embeddings 64 --micro-batch-size 4 --global-batch-size 8 \
        --train-iters 10 --lr 1e-3 --log-interval 1 --eval-interval 10 --eval-iters 0

The program takes the flags of `python -m megatron_mdm.pretrain` and stops at signals like it.
--mdm-shift is required, since the logits of a position predict the token after it. Rows, their
order and the tokens that count are those of masked diffusion. Attention is causal, and no token is
masked.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from megatron_mdm.errors import UserError
from megatron_mdm.pretrain import main


def next_tokens(objective: Any) -> Callable[..., Any]:
    """Builds the autoregressive forward step, which replaces that of masked diffusion.

    Args:
        objective: the run's `Objective`.

    Raises:
        UserError: the settings are not possible for an autoregressive model.
    """
    mdm = objective.state.mdm
    if not mdm.shift:
        raise UserError("--mdm-shift is missing: an autoregressive model predicts the next token")
    if mdm.isolate_documents:
        raise UserError("--mdm-isolate-documents: this program cannot isolate documents")
    if mdm.blocks is not None:
        raise UserError(
            "--mdm-block-size and --mdm-block-size-schedule: this program predicts single tokens, "
            "not blocks; leave them out"
        )
    return partial(forward_step, objective.state)


def forward_step(state: Any, data_iterator: Any, model: Any) -> tuple[Any, Any]:
    """Returns the next-token cross entropies of a micro-batch, and the function that sums them."""
    from megatron_mdm.mcore.model.inputs import ModelInputs
    from megatron_mdm.mcore.training.forward_step import next_batch

    batch = next_batch(state, data_iterator, model.training)
    inputs = ModelInputs.of_batch(batch, model, causal=True)
    cross_entropy = inputs.cross_entropy(model, batch.tokens)
    return cross_entropy, partial(loss_func, batch.eligible, state.mdm.normalization)


def loss_func(
    eligible: Any, normalization: Literal["tokens", "rows"], cross_entropy: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """Sums of a micro-batch in Megatron's format, normalized like the masked-diffusion loss.

    Args:
        eligible: tokens that count in the loss, bool [b, s].
        normalization: `tokens` or `rows`.
        cross_entropy: cross entropy of the token after each position, float [b, s], nats.
    """
    import torch

    from megatron_mdm.mcore.model.inputs import logits_to_tokens
    from megatron_mdm.objective.loss import row_losses

    values = logits_to_tokens(cross_entropy, shift=True)
    losses = row_losses(
        values, eligible, torch.ones_like(values), eligible.sum(dim=1), normalization
    )
    report = torch.stack([losses.numerator.detach(), losses.denominator.float()])
    return losses.numerator, losses.denominator.to(torch.int), {"lm loss": report}


if __name__ == "__main__":
    main(next_tokens)
