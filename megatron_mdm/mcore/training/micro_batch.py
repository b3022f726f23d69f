"""A micro-batch: rows with their masks, their counts and their losses."""

from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_mdm.mcore.data.batch import Batch
from megatron_mdm.objective.corruption import Corrupter, Corruption
from megatron_mdm.objective.loss import Normalization, RowLosses, Units, row_losses
from megatron_mdm.objective.segments import counts, to_positions


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """A batch and its masks.

    Values per row have the shape [b]. If documents or blocks have rates of their own, values belong
    to them and have the shape [b, s]; objective/segments.py describes that layout.
    """

    batch: Batch
    corruption: Corruption

    @classmethod
    def of(cls, batch: Batch, corrupter: Corrupter) -> "MicroBatch":
        """Masks a batch."""
        return cls(
            batch,
            corrupter(
                batch.tokens,
                batch.eligible,
                batch.uniforms,
                batch.rate_quantile,
                batch.rate_segments,
            ),
        )

    @cached_property
    def num_eligible(self) -> torch.Tensor:
        """Eligible positions L_e of rows, documents or blocks, int64."""
        return counts(self.batch.eligible, self.batch.rate_segments)

    @cached_property
    def units(self) -> Units:
        """The parts that count as one under `rows` normalization."""
        segments = self.batch.units
        return Units(segments, counts(self.batch.eligible, segments))

    @property
    def num_masked(self) -> torch.Tensor:
        """Masked positions of rows or documents, int64."""
        return counts(self.corruption.mask, self.batch.rate_segments)

    @property
    def present(self) -> torch.Tensor | None:
        """Which entries of [b, s] are documents that count, bool; None: values are per row."""
        return None if self.batch.rate_segments is None else self.num_eligible > 0

    def losses(self, cross_entropy: torch.Tensor, normalization: Normalization) -> RowLosses:
        """The losses of rows or documents, and their sum; see `row_losses`.

        Args:
            cross_entropy: cross entropies of the clean tokens, nats, float [b, s].
            normalization: `tokens` or `rows`.
        """
        return row_losses(
            cross_entropy,
            self.corruption.mask,
            self.corruption.weight,
            self.num_eligible,
            normalization,
            self.batch.rate_segments,
            self.units,
        )

    def next_token_loss(
        self, cross_entropy: torch.Tensor, normalization: Normalization
    ) -> torch.Tensor:
        """The next-token loss of the clean tokens, over the denominator of `losses`.

        Args:
            cross_entropy: cross entropies of the clean tokens of each text, nats, float [g, s].
            normalization: `tokens` or `rows`.

        Returns:
            Scalar with gradient: the numerator, which has each text as many times as it has views.
        """
        rows, predicted = self.batch.block_rows, self.batch.next_tokens
        assert rows is not None and predicted is not None
        mask, values = (x.repeat_interleave(rows.views, dim=0) for x in (predicted, cross_entropy))
        one = torch.ones_like(mask[:, :1], dtype=torch.float64)
        sizes = counts(self.batch.eligible, None)
        return row_losses(values, mask, one, sizes, normalization, None, self.units).numerator

    def contribution_to_batch_loss(self, value: torch.Tensor) -> torch.Tensor:
        """The quantity whose second moment P-POTS fits: the contribution to the batch loss.

        Under `tokens` normalization a row or document contributes L_e l, so long ones have more
        influence on the fitted density.

        Args:
            value: loss or gradient norm of each row, document or block, per eligible token.
        """
        if self.batch.mdm.normalization == "tokens":
            return value * (self.num_eligible.double() / self.batch.tokens.shape[1])
        segments, units = self.batch.rate_segments, self.units
        if segments is None or segments is units.segments:
            return value
        # A block counts by its share of the unit. All its positions have the size of the unit, so
        # its column takes any of them.
        size = to_positions(units.num_eligible, units.segments).expand_as(segments)
        size = torch.ones_like(size).scatter(1, segments, size)
        return value * (self.num_eligible.double() / size.clamp(min=1))
