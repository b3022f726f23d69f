"""Estimates the NELBO of texts with its standard error, given a callable that computes logits.

The estimator has the least variance of the available ones: exact-count masks, and rates from a
golden-ratio lattice that runs through the draws of successive texts. Lattice points are not
independent and give no error bars. The texts are therefore divided into groups, and each group is
measured in a few replicates with independent random offsets of the lattice.

    stderr       from the spread between groups: the choice of the texts, and the masking
    draw_stderr  from the spread between replicates of a group: the masking alone

Rows of one document are not independent, so they share a group. `stderr` then includes the choice
of the documents. It is unknown if all rows come from one document.

In a model with blocks, each block has a rate and an exact count of its own. The NELBO of a row is
the sum of the bounds of its blocks, each given the clean blocks before it. The quantiles of the
blocks of a row are sqrt(2) mod 1 apart. Blocks of one token have one mask, and no sampling error.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatron_mdm.errors import UserError
from megatron_mdm.objective.blocks import block_segments
from megatron_mdm.objective.corruption import Corrupter
from megatron_mdm.objective.loss import row_losses
from megatron_mdm.objective.quantiles import PHI64, of_parts
from megatron_mdm.objective.randomness import GRID_BITS, Purpose, Split, random_bits, row_uniforms
from megatron_mdm.objective.samplers import Uniform
from megatron_mdm.objective.segments import counts as counts_of
from megatron_mdm.objective.types import Floats, Integers

# Tokens int64 [B, L] -> logits float [B, L, V]. If rows have documents, it also gets the keyword
# arguments `clean` (the tokens before masking) and `documents`, both int64 [B, L].
LogitsInContext = Callable[..., torch.Tensor]
GROUPS = 64  # largest number of groups; error bars then have a relative error of about 0.1
# Masks of a continuation: enough to score answers of up to 6 tokens exactly (2^6 - 1 masks).
DRAWS = 64


@dataclass(frozen=True)
class ScoredRow:
    """One row to score.

    Attributes:
        tokens: clean tokens, int64 [L].
        eligible: which tokens are masked and scored, bool [L]; the others are always visible.
        documents: document number of each token, int64 [L]; a token attends only to tokens of its
            own document. None: a token attends to the whole row.
        origin: number of each token's document in the data set, int64 [L]. None: no other row has
            a part of this row's document.
    """

    tokens: torch.Tensor
    eligible: torch.Tensor
    documents: torch.Tensor | None = None
    origin: torch.Tensor | None = None


@dataclass(frozen=True)
class Draws:
    """Estimates for N rows of at most P blocks, in R replicates of D draws each.

    Without blocks P is 1, and a part is a whole row.

    Attributes:
        nats: unbiased estimates of the NELBO of each part, summed over its tokens, float64
            [N, R, D, P].
        rate: masking rate t of each [N, R, D, P].
        num_eligible: number of scored tokens of each part, int64 [N, P]; 0 where there is no part.
    """

    nats: Floats
    rate: Floats
    num_eligible: Integers


@dataclass(frozen=True)
class Estimate:
    """A number with its standard errors (see the module docstring).

    `stderr` is None if only one group of rows has draws. `draw_stderr` needs draws in all
    replicates, so it has no meaning for a bin with few draws.
    """

    value: float
    stderr: float | None
    draw_stderr: float


@dataclass(frozen=True)
class Evaluation:
    """The NELBO of rows.

    Attributes:
        nelbo: nats per token; every token has the same weight.
        bins: nats per token for rates in each equal bin of (0, 1]; None for a bin without draws.
            The mean over the bins is the NELBO, up to statistical errors.
        num_rows: number of rows.
        num_documents: number of documents that the rows come from.
        num_tokens: number of scored tokens.
        num_draws: number of draws (masks) of each row.
    """

    nelbo: Estimate
    bins: list[Estimate | None]
    num_rows: int
    num_documents: int
    num_tokens: int
    num_draws: int


def cut_rows(
    documents: Iterable[npt.ArrayLike], length: int, packed: bool, overlap: int = 0
) -> list[torch.Tensor]:
    """Cuts documents into rows of at most `length` tokens, without padding.

    Args:
        documents: token ids of each document, integers [n].
        length: largest number of tokens in a row.
        packed: whether to concatenate the documents first, as in pretraining; else every document
            begins a new row.
        overlap: number of tokens, below `length`, by which each row repeats the end of the previous
            row. Every row has more tokens than these.

    Returns:
        Rows, int64 [at most `length`].
    """
    arrays = [np.asarray(document, dtype=np.int64) for document in documents]
    if packed and arrays:
        arrays = [np.concatenate(arrays)]
    return [
        torch.tensor(document[first : first + length])
        for document in arrays
        for first in range(0, len(document) - overlap, length - overlap)
    ]


def evaluate(
    logits: LogitsInContext,
    rows: Sequence[ScoredRow],
    mask_token_id: int,
    draws: int = 8,
    num_bins: int = 10,
    seed: int = 0,
    batch_size: int = 16,
    device: torch.device | str | int = "cpu",
    progress: Callable[[int], None] = lambda done: None,
    block_size: int | None = None,
) -> Evaluation:
    """Estimates the NELBO per token: an upper bound on the negative log-likelihood.

    Args:
        logits: tokens int64 [B, L] -> logits float [B, L, V] of the clean tokens, unshifted; see
            `LogitsInContext`.
        rows: the rows to score; either all or none have `documents`.
        mask_token_id: token id that replaces masked tokens.
        draws: number of masks of each row, even.
        num_bins: number of bins of the rate.
        seed: seed of rates and masks; the same seed gives the same result.
        batch_size: masked rows in a call of `logits`.
        device: device of the tokens that `logits` gets.
        progress: called after each batch with its number of draws.
        block_size: tokens in a block of the model; rows then need `documents`. None: no blocks.

    Raises:
        UserError: there is nothing to score, the number of draws is odd, a row contains the mask
            token, or logits are not finite.
    """
    if draws < 2 or draws % 2:
        raise UserError(f"the number of draws of a text must be even, got {draws}")
    groups = groups_of(rows)
    drawn = draw(
        *(logits, rows, mask_token_id, 2, draws // 2, seed, groups, batch_size, device, progress),
        block_size,
    )
    tokens = int(drawn.num_eligible.sum())
    if tokens == 0:
        raise UserError("there are no tokens to score: give other texts")
    everything = np.ones_like(drawn.nats)
    index = np.ceil(drawn.rate * num_bins) - 1
    bins = [_estimate(drawn, (index == i).astype(np.float64), groups) for i in range(num_bins)]
    nelbo = _estimate(drawn, everything, groups)
    assert nelbo is not None
    return Evaluation(nelbo, bins, len(rows), num_documents(rows), tokens, draws)


def num_documents(rows: Sequence[ScoredRow]) -> int:
    """Number of documents that the rows come from."""
    origins = [row.origin for row in rows if row.origin is not None]
    known = len(torch.cat(origins).unique()) if origins else 0
    return known + len(rows) - len(origins)


def groups_of(rows: Sequence[ScoredRow]) -> Integers:
    """Assigns each row to a group; rows of one document are in the same group.

    A row with parts of several documents is assigned to the document with the most tokens in it.

    Args:
        rows: N rows.

    Returns:
        Group number of each row, from 0, int64 [N]. There are at most `GROUPS` groups. They have
        about equal sizes if documents are small.
    """
    documents = [
        -1 - i if row.origin is None else int(row.origin.mode().values)
        for i, row in enumerate(rows)
    ]
    _, document, counts = np.unique(documents, return_inverse=True, return_counts=True)
    before = counts.cumsum() - counts
    part = before * GROUPS // max(len(rows), 1)
    groups: Integers = np.unique(part[document], return_inverse=True)[1]
    return groups.astype(np.int64)


def log_likelihoods(
    logits: LogitsInContext,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    mask_token_id: int,
    draws: int = DRAWS,
    seed: int = 0,
    batch_size: int = 16,
    device: torch.device | str | int = "cpu",
    progress: Callable[[int], None] = lambda done: None,
    block_size: int | None = None,
) -> list[tuple[float, float]]:
    """Lower bounds on the conditional log-likelihoods of continuations, given their contexts.

    Only tokens of the continuation are masked. A continuation of n tokens has 2^n - 1 masks that
    mask at least one token. If this number is at most `draws`, each mask is scored once, and the
    bound has no sampling error.

    Args:
        logits: as in `evaluate`.
        pairs: token ids of (context, continuation). A shifted model (--mdm-shift) needs a context
            of at least one token.
        mask_token_id: token id that replaces masked tokens.
        draws: number of masks of each pair, a multiple of 4.
        seed: seed of rates and masks.
        batch_size: masked rows in a call of `logits`.
        device: device of the tokens that `logits` gets.
        progress: called after each batch with its number of masks; see `num_masks`.
        block_size: tokens in a block of the model. `logits` then also gets the clean tokens, and
            one document for each row. None: no blocks.

    Returns:
        For each pair, an unbiased estimate of the lower bound on log p(continuation | context),
        nats for the whole continuation, and its standard error from the masking, 0 if the bound is
        exact.

    Raises:
        UserError: `draws` is not a multiple of 4, the mask token is among the tokens, or logits are
            not finite.
    """
    if draws < 4 or draws % 4:
        raise UserError(f"the number of draws of an answer must be a multiple of 4, got {draws}")
    rows = [
        ScoredRow(
            torch.tensor([*context, *continuation], dtype=torch.int64),
            torch.tensor([False] * len(context) + [True] * len(continuation)),
            None if block_size is None else torch.zeros(len(context) + len(continuation)).long(),
        )
        for context, continuation in pairs
    ]
    _check_tokens(rows, mask_token_id)
    few = [i for i, (_, after) in enumerate(pairs) if 2 ** len(after) - 1 <= draws]
    many = sorted({*range(len(rows))} - {*few})
    bounds, errors = np.zeros((2, len(rows)))
    bounds[few] = -exact_nats(
        logits, [rows[i] for i in few], mask_token_id, batch_size, device, progress
    )
    drawn = draw(
        logits,
        [rows[i] for i in many],
        mask_token_id,
        4,
        draws // 4,
        seed,
        np.arange(len(many)),
        batch_size,
        device,
        progress,
        block_size,
    )
    replicates = drawn.nats.sum(axis=3).mean(axis=2)
    bounds[many] = -replicates.mean(axis=1)
    errors[many] = replicates.std(axis=1, ddof=1) / math.sqrt(replicates.shape[1])
    return list(zip(bounds.tolist(), errors.tolist(), strict=True))


def num_masks(num_tokens: int, draws: int) -> int:
    """Number of masks with which `log_likelihoods` scores a continuation of `num_tokens` tokens."""
    return min((1 << num_tokens) - 1, draws)


@torch.no_grad()
def exact_nats(
    logits: LogitsInContext,
    rows: Sequence[ScoredRow],
    mask_token_id: int,
    batch_size: int,
    device: torch.device | str | int = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> Floats:
    """The exact NELBO of each row, summed over its tokens, from all its masks.

    The rate t is uniform over (0, 1), and a masked token has the weight 1/t. A given mask of k of n
    tokens has the probability t^k (1 - t)^(n - k). Each of its cross entropies CE therefore has the
    weight

        integral over t of  t^(k - 1) (1 - t)^(n - k)  =  1 / (k C(n, k))

    The NELBO is the sum over the 2^n - 1 masks with at least one masked token. `draw` estimates the
    same sum: there k is uniform over 1 to n, each of the C(n, k) masks is equally likely, and the
    weight is n / k. In a model with blocks the sum is that of the bounds of the blocks: summed over
    the masks of other blocks, the weights of a block's masks are those of the block alone. For the
    arguments see `evaluate`.

    Returns:
        nats, float64 [N].

    Raises:
        UserError: the mask token is among the tokens, or logits are not finite.
    """
    _check_tokens(rows, mask_token_id)
    places = [row.eligible.nonzero()[:, 0] for row in rows]  # positions of the n tokens
    jobs = [(i, mask) for i, where in enumerate(places) for mask in range(1, 2 ** len(where))]
    nats = np.zeros(len(rows))
    for batch in _batches([len(rows[i].tokens) for i, _ in jobs], batch_size):
        chosen = [rows[jobs[job][0]] for job in batch]
        mask = torch.zeros((len(batch), len(chosen[0].tokens)), dtype=torch.bool)
        for place, job in enumerate(batch):
            i, bits = jobs[job]
            hidden = [bits >> n & 1 for n in range(len(places[i]))]
            mask[place, places[i]] = torch.tensor(hidden) > 0
        total = _cross_entropies(logits, chosen, mask, mask_token_id, device).sum(dim=1).numpy()
        _check_finite(total)
        for place, job in enumerate(batch):
            i, bits = jobs[job]
            k = bits.bit_count()
            nats[i] += total[place] / (k * math.comb(len(places[i]), k))
        progress(len(batch))
    return nats


@torch.no_grad()
def draw(
    logits: LogitsInContext,
    rows: Sequence[ScoredRow],
    mask_token_id: int,
    replicates: int,
    draws: int,
    seed: int,
    groups: Integers,
    batch_size: int,
    device: torch.device | str | int = "cpu",
    progress: Callable[[int], None] = lambda done: None,
    block_size: int | None = None,
) -> Draws:
    """Scores every row with `replicates` x `draws` masks; for other arguments see `evaluate`.

    `groups`, int64 [N], is the group number of each row, from 0 (see `groups_of`). A batch contains
    only rows of equal length, so nothing is padded.

    Raises:
        UserError: the mask token is among the tokens, or logits are not finite.
    """
    corrupter = Corrupter(Uniform(), "exact-count", mask_token_id, eps=1e-3)  # eps is not used
    _check_tokens(rows, mask_token_id)
    parts, num_eligible = _parts(rows, block_size)
    most = num_eligible.shape[1]
    quantile = lattice_quantiles(groups, replicates, draws, seed).reshape(-1)
    nats, rate = np.zeros((2, len(quantile), most))
    per_row = replicates * draws
    lengths = [len(rows[job // per_row].tokens) for job in range(len(quantile))]
    for batch in _batches(lengths, batch_size):
        chosen = [rows[job // per_row] for job in batch]
        tokens = torch.stack([row.tokens for row in chosen])
        eligible = torch.stack([row.eligible for row in chosen])
        width = tokens.shape[1]
        uniforms = [row_uniforms(seed, Split.TEST, job, width) for job in batch]
        quantiles, segments = quantile[batch], None
        if block_size is not None:
            segments = torch.stack([parts[job // per_row] for job in batch])
            quantiles = np.stack([of_parts(int(first), width) for first in quantiles])
        corrupted = corrupter(
            tokens,
            eligible,
            torch.from_numpy(np.stack(uniforms)),
            torch.from_numpy(quantiles),
            segments,
        )
        cross_entropy = _cross_entropies(logits, chosen, corrupted.mask, mask_token_id, device)
        size = counts_of(eligible, segments)
        losses = row_losses(cross_entropy, corrupted.mask, corrupted.weight, size, "rows", segments)
        here = slice(min(most, width))
        total = (losses.per_row * size).reshape(len(batch), -1)[:, here].numpy()
        _check_finite(total)
        nats[batch, here] = total
        rate[batch, here] = corrupted.t.reshape(len(batch), -1)[:, here].numpy()
        progress(len(batch))
    shape = (len(rows), replicates, draws, most)
    return Draws(nats.reshape(shape), rate.reshape(shape), num_eligible)


def _parts(
    rows: Sequence[ScoredRow], block_size: int | None
) -> tuple[list[torch.Tensor], Integers]:
    """The blocks of each row, int64 [L], and the numbers of their scored tokens [N, P]."""
    if block_size is None:
        whole = np.array([int(row.eligible.sum()) for row in rows], dtype=np.int64)
        return [], whole[:, None]
    parts = []
    for row in rows:
        assert row.documents is not None, "blocks count from the first token of a document"
        parts.append(block_segments(row.documents[None], block_size)[0])
    most = max((int(part.max()) + 1 for part in parts), default=1)
    sizes = [
        np.bincount(part.numpy(), weights=row.eligible.numpy(), minlength=most)
        for part, row in zip(parts, rows, strict=True)
    ]
    return parts, np.array(sizes, dtype=np.int64).reshape(-1, most)


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of at most `batch_size` indices of rows with equal lengths, so nothing is padded."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for _, same in itertools.groupby(order, key=lengths.__getitem__):
        yield from map(list, itertools.batched(same, batch_size))


def _cross_entropies(
    logits: LogitsInContext,
    rows: Sequence[ScoredRow],
    mask: torch.Tensor,
    mask_token_id: int,
    device: torch.device | str | int,
) -> torch.Tensor:
    """Cross entropies at the masked positions of rows of equal length; `mask` is bool [B, L].

    Returns:
        nats, float64 [B, L] on the CPU, 0 at positions that are not masked.
    """
    tokens = torch.stack([row.tokens for row in rows])
    context = {}
    documents = [row.documents for row in rows if row.documents is not None]
    if documents:
        assert len(documents) == len(rows), "all rows have documents, or none has"
        context = {"clean": tokens.to(device), "documents": torch.stack(documents).to(device)}
    seen = torch.where(mask, mask_token_id, tokens).to(device)
    scores = logits(seen, **context)[mask.to(device)]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    masked = torch.nn.functional.cross_entropy(scores, tokens[mask].to(device), reduction="none")
    cross_entropy = torch.zeros(tokens.shape, dtype=torch.float64)
    cross_entropy[mask] = masked.double().cpu()
    return cross_entropy


def _check_tokens(rows: Sequence[ScoredRow], mask_token_id: int) -> None:
    """Checks that no row contains the mask token.

    Raises:
        UserError: a row contains it.
    """
    for number, row in enumerate(rows):
        if (row.tokens == mask_token_id).any():
            raise UserError(
                f"text {number} contains the mask token {mask_token_id}, which marks masked "
                "positions: tokenize the text again without this token"
            )


def _check_finite(nats: Floats) -> None:
    """Checks that the NELBO of rows is finite.

    Raises:
        UserError: it is NaN or infinite.
    """
    if not np.isfinite(nats).all():
        raise UserError(
            "the likelihood of a text is NaN or 0: the model's logits are not finite, or are too "
            "large for its precision"
        )


def lattice_quantiles(groups: Integers, replicates: int, draws: int, seed: int) -> Integers:
    """Quantiles of the rates: one golden-ratio lattice for each replicate of a group.

    A lattice runs through the draws of the group's rows, row after row. Both the draws of one row
    and the draws of the whole group are then stratified. Each quantile is uniform over (0, 1).
    Quantiles of different groups or replicates are independent.

    Args:
        groups: group number of each row, from 0, int64 [N].
        replicates: number of replicates of each group.
        draws: number of draws of each row in a replicate.
        seed: seed of the offsets.

    Returns:
        Grid integers (see randomness.py), int64 [N, replicates, draws].
    """
    sizes = np.bincount(groups)
    place = np.empty_like(groups)  # number of each row within its group
    place[np.argsort(groups, kind="stable")] = np.arange(len(groups)) - np.repeat(
        sizes.cumsum() - sizes, sizes
    )
    number = groups[:, None] * replicates + np.arange(replicates)
    offsets = [
        random_bits(seed, Split.TEST, Purpose.OFFSET, i, 1)[0]
        for i in range(len(sizes) * replicates)
    ]
    step = (place[:, None] * draws + np.arange(draws)).astype(np.uint64)
    words = np.array(offsets, dtype=np.uint64)[number][:, :, None]
    words = words + step[:, None, :] * np.uint64(PHI64)  # modulo 2^64
    quantile: Integers = (words >> np.uint64(64 - GRID_BITS)).astype(np.int64)
    return quantile


def _estimate(drawn: Draws, chosen: Floats, groups: Integers) -> Estimate | None:
    """Sum of nats over sum of tokens, with linearised standard errors; None without draws.

    Args:
        drawn: estimates for N rows in R replicates of D draws.
        chosen: 1 for parts that count, else 0 [N, R, D, P].
        groups: group number of each row [N].
    """
    tokens = np.broadcast_to(drawn.num_eligible[:, None, None], chosen.shape)
    # [G, R]: sums over the draws of a replicate and the rows of a group.
    nats, weight = np.zeros((2, groups.max() + 1, chosen.shape[1]))
    np.add.at(nats, groups, (chosen * drawn.nats).sum(axis=(2, 3)))
    np.add.at(weight, groups, (chosen * tokens).sum(axis=(2, 3)))
    total = weight.sum()
    if total == 0:
        return None
    value = nats.sum() / total
    residual = nats - value * weight
    G, R = int((weight.sum(axis=1) > 0).sum()), residual.shape[1]
    spread = residual - residual.mean(axis=1, keepdims=True)
    draw_stderr = math.sqrt((spread**2).sum() * R / (R - 1)) / total
    stderr = None
    if G > 1:
        stderr = math.sqrt((residual.sum(axis=1) ** 2).sum() * G / (G - 1)) / total
    return Estimate(float(value), stderr, draw_stderr)
