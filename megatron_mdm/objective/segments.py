"""Segments: the parts of a batch with a masking rate of their own, either rows or documents.

For B rows of L positions, `segments`, int64 [B, L], gives the number of the segment that each
position belongs to. The numbers count within a row, never decrease along it and are below L.
Numbers may be skipped. `segments` is None if each whole row is one segment.

Values per segment have the shape [B, L], with the value of segment d in column d, or the shape [B]
for whole rows.
"""

import torch


def begins(segments: torch.Tensor) -> torch.Tensor:
    """Positions where a segment begins, bool [B, L]."""
    begin = torch.ones_like(segments, dtype=torch.bool)
    begin[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return begin


def places(segments: torch.Tensor) -> torch.Tensor:
    """The number of each position within its segment, from 0, int64 [B, L]."""
    positions = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    return positions - (positions * begins(segments)).cummax(dim=1).values


def counts(marked: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    """Number of marked positions in each segment, int64 [B, L], or [B] for whole rows.

    Args:
        marked: bool [B, L].
        segments: see above.
    """
    if segments is None:
        return marked.sum(dim=1)
    return torch.zeros_like(segments).scatter_add_(1, segments, marked.long())


def totals(values: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    """Sum of the values in each segment, dtype of `values`, [B, L], or [B] for whole rows.

    Args:
        values: floating point [B, L].
        segments: see above.
    """
    return values.sum(dim=1) if segments is None else _reduce(values, segments, "sum")


def products(values: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    """Product of the values in each segment; for shapes see `totals`."""
    return values.prod(dim=1) if segments is None else _reduce(values, segments, "prod")


def _reduce(values: torch.Tensor, segments: torch.Tensor, kind: str) -> torch.Tensor:
    # Segments are contiguous, so segment_reduce adds in a fixed order, on a GPU too; scatter_add
    # does not. A resumed run therefore gives the same bits.
    lengths = counts(torch.ones_like(segments, dtype=torch.bool), segments).flatten()
    flat = torch.segment_reduce(values.flatten(), kind, lengths=lengths, unsafe=True)
    return flat.view(segments.shape)


def to_positions(of_segments: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    """Gives each position the value of its segment: [B, L], or [B, 1] for whole rows."""
    return of_segments[:, None] if segments is None else of_segments.gather(1, segments)


def rank_within_segment(values: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    """Rank of each position's value within its segment, from 0 for the lowest, int64 [B, L].

    Args:
        values: [B, L]; equal values are ranked in the order of positions.
        segments: see above.
    """
    order = values.argsort(dim=1, stable=True)
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    if segments is None:
        return torch.empty_like(order).scatter_(1, order, places)
    # A stable sort by segment puts every segment back in its place and keeps the order inside.
    order = order.gather(1, segments.gather(1, order).argsort(dim=1, stable=True))
    lengths = counts(torch.ones_like(segments, dtype=torch.bool), segments)
    starts = to_positions(lengths.cumsum(dim=1) - lengths, segments)
    return torch.empty_like(order).scatter_(1, order, places) - starts
