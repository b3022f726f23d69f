"""GPTModel's head at masked positions only, and a hook on the gradient at its input.

Only masked positions contribute to the loss, so logits, the largest tensor, are computed only for
them. The interface does not change: cross entropies have shape [b, s] and are 0 elsewhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_mdm.mcore.model.entropies import cross_entropy_and_entropy

ROW_MULTIPLE = 32  # FP8 matrix products need multiples of 16 rows, MXFP8 of 32


class MaskedPositions:
    """Selects the masked positions of [s, b, ...], and scatters results back to all positions.

    Sequence parallelism divides s into one part for each tensor-parallel rank. Each part is
    compacted separately, to the same number of rows. Megatron's output layer gathers the compacted
    parts (and reduces them in the backward pass) like whole ones, with less traffic. Surplus rows
    hold positions that are not masked; their gradient is 0.

    The number of rows depends on the mask, so the host must copy it from the device. The copy
    starts in the constructor, before the layers run, and the host reads it when the head needs it.
    By then the layers are queued on the device, so the device does not wait for the host.

    Args:
        mask: mask of the whole rows, bool [b, s]; the same on all tensor-parallel ranks.
        parts: number of parts of s: the tensor-parallel size under sequence parallelism, else 1.
        part: index of the part that holds this rank's hidden states.
    """

    def __init__(self, mask: torch.Tensor, parts: int = 1, part: int = 0) -> None:
        self.part = part
        self._shape = mask.shape
        self._mask = mask.t().reshape(parts, -1)
        self._most = self._mask.sum(dim=1).amax().to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if mask.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    @cached_property
    def num_rows(self) -> int:
        """Rows of a part: the largest number of masked positions in any part, rounded up.

        It is a positive multiple of `ROW_MULTIPLE`.
        """
        if self._copied is not None:
            self._copied.synchronize()
        return max(1, -(-int(self._most) // ROW_MULTIPLE)) * ROW_MULTIPLE

    @cached_property
    def _chosen(self) -> torch.Tensor:
        """Positions in each part, masked ones first, int64 [parts, num_rows]."""
        order = self._mask.int().argsort(dim=1, descending=True, stable=True)[:, : self.num_rows]
        # In parts that are smaller than num_rows, surplus rows repeat the part's first position.
        return torch.nn.functional.pad(order, (0, self.num_rows - order.shape[1]))

    def compact(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps this rank's part [s / parts, b, h] to [num_rows, 1, h]."""
        chosen = self._chosen[self.part]
        return hidden_states.flatten(0, 1).index_select(0, chosen).unsqueeze(1)

    def compact_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Maps whole rows [b, s] to the concatenated parts [1, parts num_rows]."""
        by_part = labels.t().reshape(self._mask.shape)
        return by_part.gather(1, self._chosen).reshape(1, -1)

    def scatter(self, values: torch.Tensor) -> torch.Tensor:
        """Maps concatenated parts [1, parts num_rows] to whole rows [b, s], 0 where not masked."""
        by_part = values.view(self._mask.shape[0], -1)
        place = (self._mask.cumsum(dim=1) - 1).clamp(min=0)
        whole = torch.where(self._mask, by_part.gather(1, place), 0.0)
        b, s = self._shape
        return whole.view(s, b).t().contiguous()


@dataclass(frozen=True)
class HeadContext:
    """Options of `head`.

    Attributes:
        positions: positions at which logits are computed; None: all.
        on_grad_sq_norm: called in the backward pass with the squared norm of the gradient of the
            micro-batch's loss sum at the final hidden state of each position, float32 [b, s], the
            same on all tensor-parallel ranks; None: no call.
        entropies: whether to return the entropies of right predictions too.
    """

    positions: MaskedPositions | None = None
    on_grad_sq_norm: Callable[[torch.Tensor], None] | None = None
    entropies: bool = False


def head(
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    compute_language_model_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scale_logits: Callable[[torch.Tensor], torch.Tensor],
    config: Any,
    context: HeadContext,
    **_: Any,
) -> torch.Tensor:
    """Megatron's `output_processor`: cross entropies of a micro-batch.

    Args:
        hidden_states: [s, b, h], or a part of the positions under sequence parallelism.
        output_layer: Megatron's output layer.
        output_weight: weight shared with the embedding, or None.
        labels: clean tokens, int64 [b, s].
        compute_language_model_loss: GPTModel's method.
        scale_logits: GPTModel's method.
        config: Megatron's transformer configuration.
        context: Megatron's argument `output_processor_context`.

    Returns:
        Cross entropies, float [b, s], nats; 0 outside `context.positions`. With
        `context.entropies` float [2, b, s]: these, and the entropies of
        `cross_entropy_and_entropy`.
    """
    if context.on_grad_sq_norm is not None:
        _register_grad_norm_hook(hidden_states, output_layer, config, context.on_grad_sq_norm)
    positions = context.positions
    if positions is not None:
        hidden_states = positions.compact(hidden_states)
        labels = positions.compact_labels(labels)
    logits, _bias = output_layer(hidden_states, weight=output_weight)
    logits = scale_logits(logits)
    if context.entropies:
        found = cross_entropy_and_entropy(labels, logits)
        return torch.stack([x if positions is None else positions.scatter(x) for x in found])
    cross_entropy = compute_language_model_loss(labels, logits)
    return cross_entropy if positions is None else positions.scatter(cross_entropy)


def _register_grad_norm_hook(
    hidden_states: torch.Tensor,
    output_layer: Any,
    config: Any,
    record: Callable[[torch.Tensor], None],
) -> None:
    """Registers a backward hook on the final hidden states.

    The hook reads a gradient that is computed anyway, so there is no extra pass. It is registered
    before positions are selected, so the gradient covers all positions.
    """

    def look(gradient: torch.Tensor) -> None:
        norms = torch.linalg.vector_norm(gradient.detach(), dim=2, dtype=torch.float32)
        if config.grad_scale_func:
            norms = norms / config.grad_scale_func(torch.ones_like(norms))
        if output_layer.sequence_parallel:  # each rank has a part of the positions
            norms = gather_from_sequence_parallel_region(norms.contiguous())
        record(norms.square().t())

    if hidden_states.requires_grad:
        hidden_states.register_hook(look)
