"""A micro-batch: rows with their masks, their counts and their losses."""

from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_mdm.mcore.data.batch import Batch
from megatron_mdm.objective.corruption import Corrupter, Corruption
from megatron_mdm.objective.loss import Normalization, RowLosses, row_losses
from megatron_mdm.objective.segments import counts


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """A batch and its masks.

    Values per row have the shape [b]. With --mdm-rate-per document, values belong to documents and
    have the shape [b, s]; objective/segments.py describes that layout.
    """

    batch: Batch
    corruption: Corruption

    @classmethod
    def of(cls, batch: Batch, corrupter: Corrupter) -> "MicroBatch":
        """Masks a batch."""
        return cls(
            batch,
            corrupter(
                batch.tokens, batch.eligible, batch.uniforms, batch.quantile, batch.rate_segments
            ),
        )

    @cached_property
    def num_eligible(self) -> torch.Tensor:
        """Eligible positions L_e of rows or documents, int64."""
        return counts(self.batch.eligible, self.batch.rate_segments)

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
        )

    def contribution_to_batch_loss(self, value: torch.Tensor) -> torch.Tensor:
        """The quantity whose second moment P-POTS fits: the contribution to the batch loss.

        Under `tokens` normalization a row or document contributes L_e l, so long ones have more
        influence on the fitted density.

        Args:
            value: loss or gradient norm of each row or document, per eligible token.
        """
        if self.batch.mdm.normalization == "tokens":
            return value * (self.num_eligible.double() / self.batch.tokens.shape[1])
        return value
