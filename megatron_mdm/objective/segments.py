"""Segments: what has a masking rate of its own, a whole row or each document of a packed row.

Of B rows of L positions, `segments` says which segment of its row each position is of: int64
[B, L], never decreasing along a row, below L; numbers may be left out. None stands for whole rows.
What belongs to segments is then of shape [B, L], with number d in column d, or [B] for whole rows.
"""

import torch


def counts(marked: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    """Marked positions in each segment, int64 [B, L], or [B] for whole rows.

    Args:
        marked: bool [B, L].
        segments: see above.
    """
    if segments is None:
        return marked.sum(dim=1)
    return torch.zeros_like(segments).scatter_add_(1, segments, marked.long())


def totals(values: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    """Sum of each segment, of the dtype of `values`, [B, L], or [B] for whole rows.

    Args:
        values: floating point [B, L].
        segments: see above.
    """
    return values.sum(dim=1) if segments is None else _reduce(values, segments, "sum")


def products(values: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    """Product of each segment; for shapes see `totals`."""
    return values.prod(dim=1) if segments is None else _reduce(values, segments, "prod")


def _reduce(values: torch.Tensor, segments: torch.Tensor, kind: str) -> torch.Tensor:
    # Segments are contiguous, so this has a fixed order on a GPU too, where scatter_add has none: a
    # run that is resumed repeats bit for bit.
    lengths = counts(torch.ones_like(segments, dtype=torch.bool), segments).flatten()
    flat = torch.segment_reduce(values.flatten(), kind, lengths=lengths, unsafe=True)
    return flat.view(segments.shape)


def to_positions(of_segments: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    """What belongs to segments, at their positions: [B, L], or [B, 1] for whole rows."""
    return of_segments[:, None] if segments is None else of_segments.gather(1, segments)


def rank_within_segment(values: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    """Place of each position in its segment in ascending order of values, from 0, int64 [B, L].

    Args:
        values: [B, L]; equal ones in the order of positions.
        segments: see above.
    """
    order = values.argsort(dim=1, stable=True)
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    if segments is None:
        return torch.empty_like(order).scatter_(1, order, places)
    # Sorted by segment again, every segment lies where it lay before.
    order = order.gather(1, segments.gather(1, order).argsort(dim=1, stable=True))
    lengths = counts(torch.ones_like(segments, dtype=torch.bool), segments)
    starts = to_positions(lengths.cumsum(dim=1) - lengths, segments)
    return torch.empty_like(order).scatter_(1, order, places) - starts
