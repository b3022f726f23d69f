"""One micro-batch: rows, masked rows, model, loss; Megatron's `forward_step`."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_timers

from megatron_mdm.errors import UserError
from megatron_mdm.mcore.data.batch import Batch, load_batch
from megatron_mdm.mcore.data.row_dataset import needs_rows
from megatron_mdm.mcore.model.context_parallel import is_first_cp_rank, sum_over_cp_ranks
from megatron_mdm.mcore.model.inputs import (
    EmbeddingNoise,
    ModelInputs,
    logits_to_next_tokens,
    logits_to_tokens,
)
from megatron_mdm.mcore.training.micro_batch import MicroBatch
from megatron_mdm.mcore.training.nonfinite import check_finite
from megatron_mdm.mcore.training.state import TrainingState
from megatron_mdm.objective.embedding_noise import noise_keys


def forward_step(
    state: TrainingState, data_iterator: Iterator | None, model: Any
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple] | None]:
    """Runs one micro-batch through this pipeline stage.

    Args:
        state: state of the run.
        data_iterator: iterator of this virtual stage's RowDataset; used on tensor rank 0 only.
        model: the stage.

    Returns:
        The stage's output (at the last stage the cross entropy, float [b, s], nats, or with
        --mdm-confidence-loss [2, b, s]) and the loss function that Megatron applies to it at the
        last stage.
    """
    mdm, training = state.mdm, model.training
    if mdm.blocks is not None:
        _check_stages(state)
    if not needs_rows(mdm, get_attr_wrapped_model(model, "vp_stage")):
        return model(None, None, None), None

    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    micro_batch, inputs = prepare(state, data_iterator, model)
    timers("batch-generator").stop()

    corruption = micro_batch.corruption
    sampler = state.fitting_sampler if training else None
    output = inputs.cross_entropy(
        model,
        corruption.tokens,
        mask=corruption.mask if mdm.head == "masked" else None,
        on_grad_sq_norm=None if sampler is None else sampler.gradient_observer(micro_batch),
        noise=_noise(state, micro_batch),
        entropies=_has_confidence_loss(state, training),
    )
    return output, partial(loss_func, state, micro_batch)


def prepare(
    state: TrainingState, data_iterator: Iterator | None, model: Any
) -> tuple[MicroBatch, ModelInputs]:
    """Loads and masks the next rows, and makes what the model gets beside their tokens.

    Args:
        state: state of the run.
        data_iterator: iterator of a RowDataset; used on tensor rank 0 only.
        model: a stage of the model.
    """
    batch = next_batch(state, data_iterator, model.training)
    micro_batch = MicroBatch.of(batch, state.corrupter(model.training))
    return micro_batch, ModelInputs.of_batch(
        batch, model, state.attention_annealing(model.training)
    )


def _has_confidence_loss(state: TrainingState, training: bool) -> bool:
    """Whether entropies are part of the loss. Evaluations have none."""
    return training and state.mdm.confidence_loss > 0.0


def _noise(state: TrainingState, micro_batch: MicroBatch) -> EmbeddingNoise | None:
    """The noise on the embeddings of masked tokens; None: there is none."""
    batch = micro_batch.batch
    std = state.embedding_noise(batch.training)
    if not std:
        return None
    places = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    keys = noise_keys(state.seed, batch.row, places.expand_as(batch.tokens))
    return EmbeddingNoise(std, keys, micro_batch.corruption.mask)


def _check_stages(state: TrainingState) -> None:
    """Checks that Megatron's schedule knows the positions of rows with blocks.

    Otherwise stages would wait for ever for tensors of another shape, and evaluations would not
    know their block size.

    Raises:
        UserError: a script of its own trains without the context that they need.
    """
    if state.exchanges_positions:
        return
    by_size = state.mdm.eval_block_sizes is not None
    if by_size or mpu.get_pipeline_model_parallel_world_size() > 1:
        needing = "--mdm-eval-block-sizes" if by_size else "--pipeline-model-parallel-size above 1"
        raise UserError(
            f"blocks with {needing} need the context "
            "megatron_mdm.plugin.schedules_positions(objective.state) around Megatron's pretrain"
        )


def next_batch(state: TrainingState, data_iterator: Iterator | None, training: bool) -> Batch:
    """The next micro-batch of a run; see `load_batch`.

    Args:
        state: state of the run.
        data_iterator: iterator of a RowDataset; used on tensor rank 0 only.
        training: whether the micro-batch is for training, not for an evaluation.
    """
    b = state.micro_batch_size(training)
    size = state.block_size(training)
    return load_batch(data_iterator, state.mdm, state.eod_id, training, b, state.seq_length, size)


def loss_func(
    state: TrainingState, micro_batch: MicroBatch, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Megatron's loss function with --calculate-per-token-loss: sums over this micro-batch.

    Args:
        state: state of the run.
        micro_batch: rows and their masks.
        output: cross entropy of the token that each position predicts, nats, float [b, s]; under
            context parallelism, at this rank's positions only. With --mdm-confidence-loss, in
            training, [2, b, s]: these, and the entropies of right predictions.

    Returns:
        Sum of weighted losses (nats), its denominator (eligible tokens or rows, int32), and pairs
        of a sum and the denominator, which Megatron sums over micro-batches and ranks: `mdm loss`
        and, with the flags of these losses, `next-token loss` and `confidence loss`.
    """
    mdm, batch, corruption = state.mdm, micro_batch.batch, micro_batch.corruption
    rows, confident = batch.block_rows, _has_confidence_loss(state, batch.training)
    at_logits = output[0] if confident else output
    cross_entropy = logits_to_tokens(at_logits, mdm.shift, rows)
    losses = micro_batch.losses(cross_entropy, mdm.normalization)
    # The numerator and `losses` cover this rank's positions. All other values cover whole rows.
    denominator = losses.denominator * is_first_cp_rank()
    per_row = sum_over_cp_ranks(losses.per_row)
    # As in Megatron's own loss functions, the host waits here for the loss of each micro-batch.
    if state.checks_finite:
        whole_rows = per_row if per_row.dim() == 1 else per_row.sum(dim=1)
        check_finite(whole_rows, batch.row, batch.training)
    state.recorder(batch.training).add(
        split=batch.split,
        t=corruption.t,
        rate_weight=corruption.rate_weight,
        draw_weight=corruption.draw_weight,
        max_token_weight=corruption.largest_weight,
        loss=per_row,
        num_masked=micro_batch.num_masked,
        num_eligible=micro_batch.num_eligible,
        text=batch.text,
    )
    if batch.training and state.work is not None:
        state.work.add(micro_batch)
    if batch.training and state.fitting_sampler is not None:
        state.fitting_sampler.record_losses(micro_batch, per_row)
    numerator, report = losses.numerator, {"mdm loss": losses.numerator}
    if rows is not None and batch.next_tokens is not None:
        values = logits_to_next_tokens(at_logits, rows)
        report["next-token loss"] = micro_batch.next_token_loss(values, mdm.normalization)
        numerator = numerator + mdm.ar_loss_weight * report["next-token loss"]
    if confident:
        # Entropies are 0 where the prediction is wrong.
        entropies = logits_to_tokens(output[1], mdm.shift, rows)
        report["confidence loss"] = micro_batch.losses(entropies, mdm.normalization).numerator
        numerator = numerator + mdm.confidence_loss * report["confidence loss"]
    return (
        numerator,
        denominator.to(torch.int),
        {name: torch.stack([x.detach(), denominator.float()]) for name, x in report.items()},
    )
