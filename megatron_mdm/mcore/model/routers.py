"""Routers of mixtures of experts: the scale of their own losses, and rows that end early."""

from typing import Any

import torch
from megatron.core import mpu
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model


def router_loss_scale(
    transformer: TransformerConfig, seq_length: int, normalization: str
) -> torch.Tensor:
    """What multiplies the gradients of a router's own losses (balance, z) in the backward pass.

    Megatron multiplies these losses by the positions of the micro-batch, expecting that all
    gradients are divided by the number of positions of the global batch. With --mdm-normalization
    rows they are divided by its rows, seq-length times fewer, or by its documents, whose number is
    not known before the backward pass.

    Args:
        transformer: the configuration that Megatron's schedule looks at.
        seq_length: tokens in a row.
        normalization: `tokens` or `rows`.

    Returns:
        Float32 [1].
    """
    one = torch.ones(1, device=torch.cuda.current_device())
    scale = transformer.grad_scale_func(one) if transformer.grad_scale_func else one
    return scale / seq_length if normalization == "rows" else scale


def shard_for_stage(positions: torch.Tensor, model: Any) -> torch.Tensor:
    """`padding_mask` as a stage of the model takes it.

    Of all stages GPTModel's first one alone cuts it for sequence parallelism.

    Args:
        positions: what the routers' losses leave out, bool [b, s].
        model: the stage.

    Returns:
        bool [b, s], or this tensor rank's [b, s / ranks].
    """
    stage = unwrap_model(model)
    cuts = isinstance(stage, GPTModel) and stage.pre_process
    if cuts or not stage.config.sequence_parallel:
        return positions
    parts = positions.chunk(mpu.get_tensor_model_parallel_world_size(), dim=1)
    return parts[mpu.get_tensor_model_parallel_rank()]


class ShortRowRouter(TopKRouter):
    """Megatron's router, with losses of rows that end early that no layout changes.

    With positions left out Megatron (0.19.2) multiplies a loss by as many times too much as there
    are parts of a row, under sequence and context parallelism; and `seq_aux_loss` balances each row
    as if it had the mean length of the micro-batch's. With both mended rows count with as many
    positions as they have.
    """

    lengths: torch.Tensor | None = None  # of the rows in the call that runs, int64 [b]

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Routes logits [s, b, experts]; what `padding_mask` [s, b] marks is left out of losses."""
        self.lengths = None
        if padding_mask is not None:
            self.lengths = (~padding_mask).sum(dim=0)
            if self.tp_cp_group.size() > 1:
                torch.distributed.all_reduce(self.lengths, group=self.tp_cp_group)
        return super().routing(logits, padding_mask)

    def _apply_seq_aux_loss(
        self, probs: torch.Tensor, scores_for_aux_loss: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The balance of each row; what is left out has no scores."""
        if self.lengths is not None:
            by_row = scores_for_aux_loss.view(-1, len(self.lengths), scores_for_aux_loss.shape[-1])
            # Divided by the square of the mean length, where that of its own times the mean is due.
            by_row = by_row * (self.lengths.float().mean() / self.lengths)[:, None]
            scores_for_aux_loss = by_row.view_as(scores_for_aux_loss)
        return super()._apply_seq_aux_loss(probs, scores_for_aux_loss, *args, **kwargs)

    def attach_and_log_load_balancing_loss(
        self, *args: Any, valid_token_count: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """Attaches a loss, times the positions that count and not `valid_token_count`."""
        if self.lengths is not None:
            valid_token_count = self.lengths.sum() / self.tp_cp_group.size()
        return super().attach_and_log_load_balancing_loss(
            *args, valid_token_count=valid_token_count, **kwargs
        )


def use_short_row_routers(model: torch.nn.Module) -> None:
    """Makes the routers of a model `ShortRowRouter`s."""
    for module in model.modules():
        if type(module) is TopKRouter:
            module.__class__ = ShortRowRouter
