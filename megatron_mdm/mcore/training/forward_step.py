"""One micro-batch: rows, masked rows, model, loss; Megatron's `forward_step`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_timers

from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.data.documents import document_numbers, position_ids
from megatron_mdm.mcore.data.row_dataset import FIXED, needs_rows, row_columns
from megatron_mdm.mcore.model.attention_mask import annealed_future_positions, attention_mask
from megatron_mdm.mcore.model.masked_head import HeadContext, MaskedPositions, head
from megatron_mdm.mcore.model.routers import shard_for_stage
from megatron_mdm.mcore.training.context_parallel import (
    is_first_cp_rank,
    shard_sequence,
    sum_over_cp_ranks,
    unshard_sequence,
)
from megatron_mdm.mcore.training.nonfinite import check_finite
from megatron_mdm.mcore.training.state import TrainingState
from megatron_mdm.objective.corruption import Corruption
from megatron_mdm.objective.loss import row_losses
from megatron_mdm.objective.segments import counts, totals


@dataclass(frozen=True)
class Rows:
    """A micro-batch of b rows of s positions, on the device; see RowDataset."""

    tokens: torch.Tensor
    num_tokens: torch.Tensor
    length: torch.Tensor
    split: torch.Tensor
    row: torch.Tensor
    uniforms: torch.Tensor
    quantile: torch.Tensor
    text: torch.Tensor | None = None
    document: torch.Tensor | None = None

    @property
    def padding(self) -> torch.Tensor:
        """Positions that hold no token, bool [b, s]."""
        return self._from(self.num_tokens)

    @property
    def beyond(self) -> torch.Tensor:
        """Positions after the end of rows that end early, bool [b, s]."""
        return self._from(self.length)

    def eligible(self, eod_id: int, mdm: MDMConfig) -> torch.Tensor:
        """Positions that may be masked and count in the loss, bool [b, s]."""
        documents = self.isolated(eod_id, mdm)
        eligible = eligible_positions(self.tokens, self.padding, eod_id, mdm, documents)
        return eligible & (self.uniforms != FIXED) & ~self.beyond

    def documents(self, eod_id: int) -> torch.Tensor:
        """Which document of its row each position is of, int64 [b, s]; padding is one more."""
        document = self.document
        if document is None:
            document = document_numbers(self.tokens, eod_id)
        last = document.masked_fill(self.padding, -1).amax(dim=1, keepdim=True)
        return torch.where(self.padding, last + 1, document)

    def isolated(self, eod_id: int, mdm: MDMConfig) -> torch.Tensor | None:
        """What attention stays inside, int64 [b, s] (see `attention_mask`); None: the row."""
        if mdm.isolate_documents:
            return self.documents(eod_id)
        if mdm.random_length_fraction:
            return self.beyond.long()
        return None

    def segments(self, eod_id: int, mdm: MDMConfig) -> torch.Tensor | None:
        """What draws a rate of its own in training: documents, int64 [b, s]; None: the row."""
        return self.documents(eod_id) if mdm.rate_per == "document" else None

    def _from(self, start: torch.Tensor) -> torch.Tensor:
        """Positions from `start` [b] on, bool [b, s]."""
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return positions >= start[:, None]


def eligible_positions(
    tokens: torch.Tensor,
    padding: torch.Tensor,
    eod_id: int,
    mdm: MDMConfig,
    documents: torch.Tensor | None,
) -> torch.Tensor:
    """Positions of text without a prompt that may be masked, bool [b, s].

    Args:
        tokens: clean tokens, int64 [b, s].
        padding: bool [b, s].
        eod_id: end-of-document token.
        mdm: settings of the objective.
        documents: what attention stays inside, int64 [b, s]; None: the row.
    """
    eligible = ~padding
    if not mdm.eod_eligible:
        eligible &= tokens != eod_id
    if mdm.pad_eligible:
        eligible |= padding
    if mdm.shift:  # nothing predicts the first token of what attention sees
        eligible &= position_ids(tokens, documents) > 0
    return eligible


def forward_step(
    state: TrainingState, data_iterator: Iterator | None, model: Any
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple] | None]:
    """Runs one micro-batch through this pipeline stage.

    Args:
        state: of the run.
        data_iterator: of this virtual stage's RowDataset; used on tensor rank 0 only.
        model: the stage.

    Returns:
        The stage's output (at the last stage the cross entropy, float [b, s], nats) and the loss
        function that Megatron applies to it at the last stage.
    """
    mdm = state.mdm
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    if not needs_rows(mdm, vp_stage):
        return model(None, None, None), None

    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    training = model.training
    rows = load_rows(state, data_iterator, training)
    eod_id = state.eod_id
    eligible = rows.eligible(eod_id, mdm)
    segments = rows.segments(eod_id, mdm) if training else None
    corrupted = state.corrupter(training)(
        rows.tokens, eligible, rows.uniforms, rows.quantile, segments
    )
    progress = 1.0
    if training and mdm.anneal_attention_iters:
        progress = (state.iteration - 1) / mdm.anneal_attention_iters
    ahead = annealed_future_positions(rows.uniforms, progress)
    documents = rows.isolated(eod_id, mdm)
    packed = state.transformer_impl == "transformer_engine"
    hidden = attention_mask(rows.tokens, rows.padding, eod_id, mdm, documents, ahead, packed)
    timers("batch-generator").stop()

    num_eligible = counts(eligible, segments)
    record = None
    if training and state.sampler is not None and mdm.ppots_target == "gradient":
        record = partial(record_gradients, state, corrupted, num_eligible, segments)
    positions = None
    if mdm.head == "masked":
        positions = masked_positions(
            shard_sequence(at_logits(corrupted.mask, mdm.shift)), state.sequence_parallel
        )
    padding = None
    if state.has_experts and mdm.random_length_fraction:
        padding = shard_for_stage(shard_sequence(rows.beyond), model)
    output = model(
        shard_sequence(corrupted.tokens),
        shard_sequence(position_ids(rows.tokens, documents)),
        hidden,
        padding_mask=padding,
        labels=shard_sequence(at_logits(rows.tokens, mdm.shift)),
        output_processor=head,
        output_processor_context=HeadContext(positions, record),
    )
    return output, partial(loss_func, state, rows, corrupted, num_eligible, segments, training)


def at_logits(values: torch.Tensor, shift: bool) -> torch.Tensor:
    """Moves what belongs to tokens, [b, s], to the positions of the logits that predict them.

    With --mdm-shift these are one to the left. The first token, which is never masked, goes last.
    """
    return values.roll(-1, dims=1) if shift else values


def at_tokens(values: torch.Tensor, shift: bool) -> torch.Tensor:
    """The inverse of `at_logits`."""
    return values.roll(1, dims=1) if shift else values


def load_rows(state: TrainingState, data_iterator: Iterator | None, training: bool) -> Rows:
    """The next micro-batch on every tensor-parallel rank, by one broadcast of one tensor.

    Args:
        state: of the run.
        data_iterator: None on tensor ranks other than 0.
        training: whether the micro-batch is training's or an evaluation's, which differ in size.
    """
    b = state.micro_batch_size if training else state.eval_micro_batch_size
    is_vector = row_columns(state.mdm, training)
    widths = [state.seq_length if vector else 1 for vector in is_vector.values()]
    device = torch.cuda.current_device()
    if mpu.get_tensor_model_parallel_rank() == 0:
        batch = next(data_iterator)
        parts = [batch[name].view(b, -1) for name in is_vector]
        packed = side_by_side(parts).to(device, non_blocking=True)
    else:
        packed = torch.empty((b, sum(widths)), dtype=torch.int64, device=device)
    if mpu.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            packed,
            mpu.get_tensor_model_parallel_src_rank(),
            group=mpu.get_tensor_model_parallel_group(),
        )
    parts = zip(is_vector.items(), packed.split(widths, dim=1), strict=True)
    return Rows(
        **{name: part.contiguous() if vector else part[:, 0] for (name, vector), part in parts}
    )


def side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
    """Tensors [b, n], int64, in one [b, sum of n], pinned like them: else the host waits in .to().

    Args:
        parts: on the CPU, pinned by Megatron's loader where there is a GPU.
    """
    b, n = parts[0].shape[0], sum(part.shape[1] for part in parts)
    whole = torch.empty((b, n), dtype=torch.int64, pin_memory=parts[0].is_pinned())
    return torch.cat(parts, dim=1, out=whole)


def loss_func(
    state: TrainingState,
    rows: Rows,
    corrupted: Corruption,
    num_eligible: torch.Tensor,
    segments: torch.Tensor | None,
    training: bool,
    cross_entropy: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Megatron's loss function with --calculate-per-token-loss: sums over this micro-batch.

    Args:
        state: of the run.
        rows: the micro-batch.
        corrupted: its masks and weights.
        num_eligible: L_e, int64 [b], or [b, s] with segments.
        segments: documents with a rate of their own; None: rows.
        training: whether it is training's.
        cross_entropy: of the token that each position predicts, nats, float [b, s], or of this
            rank's part of the positions under context parallelism.

    Returns:
        Sum of weighted losses (nats), its denominator (eligible tokens or rows, int32), and the
        pair of both as `mdm loss`, which Megatron adds up over micro-batches and ranks.
    """
    cross_entropy = at_tokens(unshard_sequence(cross_entropy), state.mdm.shift)
    losses = row_losses(
        cross_entropy,
        corrupted.mask,
        corrupted.weight,
        num_eligible,
        state.mdm.normalization,
        segments,
    )
    # Numerator and losses are of this rank's part of the positions, all else is of whole rows.
    denominator = losses.denominator * is_first_cp_rank()
    per_row = sum_over_cp_ranks(losses.per_row)
    # As in Megatron's own loss functions: the host waits for the loss, in each micro-batch.
    if state.checks_finite:
        check_finite(per_row if segments is None else per_row.sum(dim=1), rows.row, training)
    state.recorder(training).add(
        split=rows.split,
        t=corrupted.t,
        rate_weight=corrupted.rate_weight,
        weight=corrupted.largest_weight,
        loss=per_row,
        num_masked=counts(corrupted.mask, segments),
        num_eligible=num_eligible,
        text=rows.text,
    )
    if training and state.sampler is not None and state.mdm.ppots_target == "loss":
        _record(state, corrupted, num_eligible, segments, per_row / corrupted.rate_weight)
    report = torch.stack([losses.numerator.detach(), denominator.float()])
    return losses.numerator, denominator.to(torch.int), {"mdm loss": report}


def masked_positions(mask: torch.Tensor, sequence_parallel: bool) -> MaskedPositions:
    """Where the head works in this rank's part of the positions.

    Args:
        mask: bool [b, s], of this rank's positions under context parallelism.
        sequence_parallel: whether tensor-parallel ranks divide them once more.
    """
    if not sequence_parallel:
        return MaskedPositions(mask)
    parts = mpu.get_tensor_model_parallel_world_size()
    return MaskedPositions(mask, parts, mpu.get_tensor_model_parallel_rank())


def record_gradients(
    state: TrainingState,
    corrupted: Corruption,
    num_eligible: torch.Tensor,
    segments: torch.Tensor | None,
    squares: torch.Tensor,
) -> None:
    """Gives the online sampler ||dl/dh|| of each row or document, from the gradient of the sum.

    Args:
        state: of the run.
        corrupted: the micro-batch's masks and weights.
        num_eligible: L_e, int64 [b], or [b, s] with segments.
        segments: documents with a rate of their own; None: rows.
        squares: squared norms of the gradient of the loss sum at this rank's final hidden states
            [b, s / ranks].
    """
    squares = at_tokens(unshard_sequence(squares), state.mdm.shift)
    norms = sum_over_cp_ranks(totals(squares, segments)).sqrt()
    value = norms / corrupted.rate_weight
    if state.mdm.normalization == "tokens":  # where the sum holds L_e l, and not l
        value = value / num_eligible.clamp(min=1)
    _record(state, corrupted, num_eligible, segments, value)


def _record(
    state: TrainingState,
    corrupted: Corruption,
    num_eligible: torch.Tensor,
    segments: torch.Tensor | None,
    value: torch.Tensor,
) -> None:
    """Gives the online sampler the values of rows or documents, per eligible token."""
    value = contribution_to_batch_loss(
        value, num_eligible, state.mdm.normalization, state.seq_length
    )
    present = None if segments is None else num_eligible > 0
    state.sampler.record(corrupted.t, value, corrupted.rate_weight, present)


def contribution_to_batch_loss(
    value: torch.Tensor, num_eligible: torch.Tensor, normalization: str, seq_length: int
) -> torch.Tensor:
    """What P-POTS squares of rows or documents: how much they disturb the sum over a batch.

    Under `tokens` they do so as L_e l, so that long ones say more of the best density.

    Args:
        value: per eligible token, [b], or [b, s] of documents.
        num_eligible: L_e, of the same shape.
        normalization: `tokens` or `rows`.
        seq_length: tokens in a row.
    """
    if normalization == "tokens":
        return value * (num_eligible.double() / seq_length)
    return value
