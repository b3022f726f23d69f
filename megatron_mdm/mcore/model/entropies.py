"""Cross entropies, and the entropies of right predictions, of a vocabulary that ranks divide.

The cross entropy has the steps of Megatron's own, the functions of `VocabParallelCrossEntropy`, and
therefore the same bits. Both losses share the probabilities that Megatron's cross entropy keeps for
the backward pass, so that the entropies need no second tensor of the size of the logits.
"""

from typing import Any

import torch
from megatron.core import mpu
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy as Steps

from megatron_mdm.objective.confidence import entropy, entropy_gradient

CHUNK = 2**24  # numbers of a temporary tensor: 64 MiB in float32


def cross_entropy_and_entropy(
    labels: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropies of labels, and entropies where the label has the greatest logit.

    The cross entropy is that of Megatron's `compute_language_model_loss` without
    --cross-entropy-loss-fusion, bit for bit. Like it, the call may overwrite `logits`.

    Args:
        labels: int64 [b, s].
        logits: float [s, b, V / tensor-parallel ranks]. Padding rows of the vocabulary have the
            dtype's minimum (see `mask_padded_vocabulary`), so they have the probability 0 and add
            nothing.

    Returns:
        Two tensors float32 [b, s], nats: cross entropies; and entropies of the predicted
        distributions, 0 where another token has a greater logit than the label.
    """
    by_position = labels.transpose(0, 1).contiguous()
    found = _CrossEntropyAndEntropy.apply(logits, by_position)  # type: ignore[no-untyped-call]
    cross_entropy, entropies = (x.transpose(0, 1).contiguous() for x in found)
    return cross_entropy, entropies


class _CrossEntropyAndEntropy(torch.autograd.Function):
    """Maps logits [s, b, V / ranks] and labels [s, b] to two tensors [s, b]."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        group = mpu.get_tensor_model_parallel_group()
        logits, largest = Steps.calculate_logits_max(logits)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
        size = logits.shape[-1]
        first = mpu.get_tensor_model_parallel_rank() * size
        outside, own_label, predicted, total, exponentials = Steps.calculate_predicted_logits(
            logits, labels, largest, first, first + size
        )
        torch.distributed.all_reduce(predicted, group=group)
        torch.distributed.all_reduce(total, group=group)
        p, loss = Steps.calculate_cross_entropy_loss(exponentials, predicted, total)
        rows = p.view(-1, size)
        whole = torch.cat([entropy(chunk) for chunk in rows.split(_rows_of_chunk(size))])
        torch.distributed.all_reduce(whole, group=group)
        # The largest logit has been subtracted.
        is_right = (predicted == 0.0).flatten()
        ctx.save_for_backward(p, outside, own_label, whole, is_right)
        return loss, torch.where(is_right, whole, 0.0).view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        p, outside, own_label, whole, is_right = ctx.saved_tensors
        of_loss, of_entropy = (x.flatten() for x in gradients)
        of_entropy = torch.where(is_right, of_entropy, 0.0)
        rows, place, inside, result = Steps.prepare_gradient_calculation_operands(p, outside)
        count = _rows_of_chunk(rows.shape[1])
        for start in range(0, len(rows), count):
            at = slice(start, start + count)
            chunk = rows[at]
            of_entropies = entropy_gradient(chunk, whole[at], of_entropy[at])
            # In place, as Megatron does: `result` becomes the gradient.
            Steps.calculate_gradients(
                chunk, place[: len(chunk)], own_label[at], inside[at], chunk, of_loss[at]
            )
            chunk.add_(of_entropies)
        return result, None


def _rows_of_chunk(size: int) -> int:
    """Rows of `size` numbers in a temporary tensor."""
    return max(1, CHUNK // size)
