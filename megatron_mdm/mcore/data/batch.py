"""A batch of rows: its columns, and the values that follow from them and the settings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from megatron.core import mpu

from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.data.documents import document_numbers, eligible_positions
from megatron_mdm.mcore.data.row_dataset import row_columns
from megatron_mdm.objective.blocks import BlockRows


@dataclass(frozen=True, eq=False)
class Batch:
    """b rows of s positions, and derived values, each computed once.

    Attributes:
        mdm: settings of the objective.
        eod_id: end-of-document token.
        training: whether the rows are training rows, not evaluation rows.
        tokens: clean tokens, int64 [b, s]. This and all following attributes but the last are the
            stacked columns of `RowDataset`'s rows, int64 [b, s] or [b].
        block_size: tokens in a block; None: rows are not divided into blocks.
    """

    mdm: MDMConfig
    eod_id: int
    training: bool
    tokens: torch.Tensor
    num_tokens: torch.Tensor
    length: torch.Tensor
    split: torch.Tensor
    row: torch.Tensor
    uniforms: torch.Tensor
    quantile: torch.Tensor
    text: torch.Tensor | None = None
    document: torch.Tensor | None = None
    maskable: torch.Tensor | None = None
    block_size: int | None = None

    @classmethod
    def of_rows(
        cls,
        rows: Sequence[Mapping[str, torch.Tensor]],
        mdm: MDMConfig,
        eod_id: int,
        training: bool = True,
        block_size: int | None = None,
    ) -> "Batch":
        """Stacks rows of a `RowDataset`."""
        columns = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return cls(mdm, eod_id, training, block_size=block_size, **columns)

    def to(self, device: torch.device | int) -> "Batch":
        """The same rows on a device."""
        columns: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, column in columns.items():
            if torch.is_tensor(column):
                columns[name] = column.to(device)
        return Batch(**columns)

    @cached_property
    def padding(self) -> torch.Tensor:
        """Positions that hold padding, bool [b, s]."""
        return self._from(self.num_tokens)

    @cached_property
    def past_end(self) -> torch.Tensor:
        """Positions after the end of rows that end early, bool [b, s]."""
        return self._from(self.length)

    @cached_property
    def documents(self) -> torch.Tensor:
        """The number of each position's document, int64 [b, s]; padding counts as one more."""
        document = self.document
        if document is None:
            document = document_numbers(self.tokens, self.eod_id)
        last = document.masked_fill(self.padding, -1).amax(dim=1, keepdim=True)
        return torch.where(self.padding, last + 1, document)

    @cached_property
    def attention_segments(self) -> torch.Tensor | None:
        """The parts of rows that attention stays within, int64 [b, s]; None: whole rows."""
        if self.mdm.isolate_documents:
            return self.documents
        if self.mdm.random_length_fraction:
            return self.past_end.long()
        return None

    @cached_property
    def rate_segments(self) -> torch.Tensor | None:
        """The parts of rows that have separate masking rates, int64 [b, s]; None: whole rows.

        See objective/segments.py. Evaluations have one rate per block, or per row without blocks.
        In training a block without a size is the whole document, or the whole row.
        """
        if not self.training:
            return None if self.block_rows is None else self.block_rows.blocks
        unit = self.mdm.rate_unit
        if unit == "document":
            return self.documents
        if unit == "block":
            if self.block_rows is not None:
                return self.block_rows.blocks.repeat_interleave(self.block_rows.views, dim=0)
            return self.documents if self.mdm.isolate_documents else None
        return None

    @property
    def rate_quantile(self) -> torch.Tensor:
        """The quantile of the rate of each row [b], or segment [b, s], as grid integers."""
        if self.rate_segments is None and self.quantile.dim() == 2:
            return self.quantile[:, 0]
        return self.quantile

    @property
    def units(self) -> torch.Tensor | None:
        """The parts that count as one under --mdm-normalization rows; None: whole rows."""
        if self.rate_segments is None or not self.training:
            return None
        by_document = self.mdm.rate_unit == "document" or self.mdm.isolate_documents
        return self.documents if by_document else None

    @cached_property
    def block_rows(self) -> BlockRows | None:
        """The positions of the model's rows; None: one for each token.

        Evaluations predict first tokens from what the block sees, as decoders do.
        """
        if self.block_size is None:
            return None
        views = self.mdm.views if self.training else 1
        return BlockRows(
            self._block_documents[::views],
            self.block_size,
            views,
            self.mdm.shift,
            self.training and self.mdm.shift_first == "noisy",
            self.mdm.ar_loss_weight > 0.0,
        )

    @cached_property
    def next_tokens(self) -> torch.Tensor | None:
        """Clean tokens of the next-token loss, bool [texts, s]; None: there is no such loss."""
        rows = self.block_rows
        if rows is None or not (self.training and self.mdm.ar_loss_weight):
            return None
        return rows.next_tokens(self.eligible[:: rows.views])

    @property
    def _block_documents(self) -> torch.Tensor:
        """The parts of rows from whose first token blocks count, int64 [b, s]."""
        segments = self.attention_segments
        return torch.zeros_like(self.tokens) if segments is None else segments

    @cached_property
    def eligible(self) -> torch.Tensor:
        """Positions that may be masked and count in the loss, bool [b, s]."""
        eligible = eligible_positions(
            self.tokens, self.padding, self.eod_id, self.mdm, self.attention_segments
        )
        if self.maskable is not None:
            eligible = eligible & (self.maskable != 0)
        return eligible & ~self.past_end

    def _from(self, start: torch.Tensor) -> torch.Tensor:
        """Positions from `start` [b] on, bool [b, s]."""
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return positions >= start[:, None]


def load_batch(
    data_iterator: Iterator | None,
    mdm: MDMConfig,
    eod_id: int,
    training: bool,
    micro_batch_size: int,
    seq_length: int,
    block_size: int | None = None,
) -> Batch:
    """The next micro-batch on every tensor-parallel rank, by one broadcast of one tensor.

    Args:
        data_iterator: iterator of a `RowDataset`; None on tensor-parallel ranks other than 0.
        mdm: settings of the objective.
        eod_id: end-of-document token.
        training: whether the micro-batch is for training, not for an evaluation.
        micro_batch_size: b.
        seq_length: s.
        block_size: see `Batch`.
    """
    is_vector = row_columns(mdm, training)
    widths = [seq_length if vector else 1 for vector in is_vector.values()]
    device = torch.cuda.current_device()
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None
        rows = next(data_iterator)
        parts = [rows[name].view(micro_batch_size, -1) for name in is_vector]
        packed = side_by_side(parts).to(device, non_blocking=True)
    else:
        packed = torch.empty((micro_batch_size, sum(widths)), dtype=torch.int64, device=device)
    if mpu.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            packed,
            mpu.get_tensor_model_parallel_src_rank(),
            group=mpu.get_tensor_model_parallel_group(),
        )
    columns = {
        name: part.contiguous() if vector else part[:, 0]
        for (name, vector), part in zip(is_vector.items(), packed.split(widths, dim=1), strict=True)
    }
    return Batch(mdm, eod_id, training, block_size=block_size, **columns)


def side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
    """Concatenates int64 tensors [b, n] to one tensor [b, sum of n].

    The result is pinned if the parts are. With unpinned memory the host would wait in `.to()`.

    Args:
        parts: tensors on the CPU, which Megatron's loader pins if there is a GPU.
    """
    b, n = parts[0].shape[0], sum(part.shape[1] for part in parts)
    whole = torch.empty((b, n), dtype=torch.int64, pin_memory=parts[0].is_pinned())
    return torch.cat(parts, dim=1, out=whole)
