"""Routers of mixtures of experts: the scale of the routers' losses, and rows that end early."""

from typing import Any

import torch
from megatron.core import mpu
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model


def router_loss_scale(
    transformer: TransformerConfig,
    seq_length: int,
    normalization: str,
    positions_per_token: float = 1.0,
) -> torch.Tensor:
    """The factor on the gradients of a router's own losses (balance, z) in the backward pass.

    Megatron multiplies these losses by the number of positions of the micro-batch, because it
    expects gradients to be divided by the number of positions of the global batch. With
    --mdm-normalization rows, gradients are divided by the number of rows, which is smaller by
    a factor of seq-length, or by the number of documents, which is not known before the backward
    pass. Rows with blocks have more positions than tokens. The factor makes up for both, so that
    the losses are means over all positions, clean copies included, with the given coefficients.

    Args:
        transformer: the configuration that Megatron's schedule reads.
        seq_length: tokens in a row.
        normalization: `tokens` or `rows`.
        positions_per_token: positions of the model for each token of the batch's rows, views
            included.

    Returns:
        Float32 [1].
    """
    one = torch.ones(1, device=torch.cuda.current_device())
    scale = transformer.grad_scale_func(one) if transformer.grad_scale_func else one
    scale = scale / positions_per_token
    return scale / seq_length if normalization == "rows" else scale


def shard_for_stage(positions: torch.Tensor, model: Any) -> torch.Tensor:
    """The argument `padding_mask` in the form that a stage of the model expects.

    Only GPTModel's first stage shards it for sequence parallelism itself.

    Args:
        positions: positions that the routers' losses leave out, bool [b, s].
        model: the stage.

    Returns:
        bool [b, s], or this tensor rank's part [b, s / ranks].
    """
    stage = unwrap_model(model)
    cuts = isinstance(stage, GPTModel) and stage.pre_process
    if cuts or not stage.config.sequence_parallel:
        return positions
    parts = positions.chunk(mpu.get_tensor_model_parallel_world_size(), dim=1)
    return parts[mpu.get_tensor_model_parallel_rank()]


class ShortRowRouter(TopKRouter):
    """Megatron's router, whose losses for rows that end early are the same in every layout.

    It corrects two faults of Megatron 0.19.2 that appear when positions are left out. Under
    sequence and context parallelism, a loss is too large by a factor: the number of parts of a row.
    `seq_aux_loss` balances each row as if it had the mean length of the micro-batch's rows. With
    both corrections each row is weighted by its own number of positions.
    """

    lengths: torch.Tensor | None = None  # row lengths of the current call, int64 [b]

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Routes logits [s, b, experts]; losses omit the positions in `padding_mask` [s, b]."""
        self.lengths = None
        if padding_mask is not None:
            self.lengths = (~padding_mask).sum(dim=0)
            if self.tp_cp_group.size() > 1:
                torch.distributed.all_reduce(self.lengths, group=self.tp_cp_group)
        return super().routing(logits, padding_mask)

    def _apply_seq_aux_loss(
        self, probs: torch.Tensor, scores_for_aux_loss: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The balance loss of each row; positions that are left out have scores of 0."""
        if self.lengths is not None:
            by_row = scores_for_aux_loss.view(-1, len(self.lengths), scores_for_aux_loss.shape[-1])
            # Megatron divides by the square of the mean length. The correct divisor is the row's
            # own length times the mean length.
            by_row = by_row * (self.lengths.float().mean() / self.lengths)[:, None]
            scores_for_aux_loss = by_row.view_as(scores_for_aux_loss)
        return super()._apply_seq_aux_loss(probs, scores_for_aux_loss, *args, **kwargs)

    def attach_and_log_load_balancing_loss(
        self, *args: Any, valid_token_count: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """Attaches a loss, multiplied by the number of positions that are not left out.

        That number replaces Megatron's `valid_token_count`.
        """
        if self.lengths is not None:
            valid_token_count = self.lengths.sum() / self.tp_cp_group.size()
        return super().attach_and_log_load_balancing_loss(
            *args, valid_token_count=valid_token_count, **kwargs
        )


def use_short_row_routers(model: torch.nn.Module) -> None:
    """Turns the routers of a model into `ShortRowRouter`s."""
    for module in model.modules():
        if type(module) is TopKRouter:
            module.__class__ = ShortRowRouter
