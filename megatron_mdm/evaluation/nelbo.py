"""The NELBO of texts with its standard error, over a callable that gives logits.

The estimator is the one of least variance: masks of an exact count, and rates from a golden-ratio
lattice over the draws of successive texts. Lattice points are not independent, so that error bars
come from what is: texts form groups, and each group is drawn in a few replicates, every one with a
random offset of its own.

    stderr       from the spread of the groups: which texts were chosen, and how they were masked
    draw_stderr  from the spread of the replicates within the groups: the masking alone

Rows of one document are akin: they are in one group, so that `stderr` is that of the choice of
documents, and unknown where all rows are of one.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatron_mdm.errors import UserError
from megatron_mdm.objective.corruption import Corrupter
from megatron_mdm.objective.loss import row_losses
from megatron_mdm.objective.quantiles import PHI64
from megatron_mdm.objective.randomness import GRID_BITS, Purpose, Split, random_bits, row_uniforms
from megatron_mdm.objective.samplers import Uniform
from megatron_mdm.objective.types import Floats, Integers

# Tokens int64 [B, L] -> logits float [B, L, V]. Where rows have documents it also gets, by name,
# `clean`, the tokens before masking, and `documents`, both int64 [B, L].
LogitsInContext = Callable[..., torch.Tensor]
GROUPS = 64  # at most; enough for an error bar to be known to a tenth
# Masks of a continuation: as many as answers of 6 tokens have, or of fewer.
DRAWS = 64


@dataclass(frozen=True)
class ScoredRow:
    """One row to score.

    Attributes:
        tokens: clean tokens, int64 [L].
        eligible: the tokens that are masked and scored, bool [L]; the others are always seen.
        documents: number of each token's document, outside which it sees nothing, int64 [L]; None:
            it sees the whole row.
        origin: number, in the data, of the document that each token is from, int64 [L]; None: they
            are from a document that no other row has a part of.
    """

    tokens: torch.Tensor
    eligible: torch.Tensor
    documents: torch.Tensor | None = None
    origin: torch.Tensor | None = None


@dataclass(frozen=True)
class Draws:
    """What N rows cost in R replicates of D draws.

    Attributes:
        nats: unbiased estimates of a row's NELBO, its sum over tokens, float64 [N, R, D].
        rate: masking rate t of each [N, R, D].
        num_eligible: tokens scored, int64 [N].
    """

    nats: Floats
    rate: Floats
    num_eligible: Integers


@dataclass(frozen=True)
class Estimate:
    """A number with its standard errors (see the module).

    `stderr` is None where a single group of rows has draws; `draw_stderr` needs draws in all
    replicates, and so means nothing for a bin of few draws.
    """

    value: float
    stderr: float | None
    draw_stderr: float


@dataclass(frozen=True)
class Evaluation:
    """The NELBO of rows.

    Attributes:
        nelbo: nats per token, all tokens counting alike.
        bins: nats per token at rates in each equal bin of (0, 1], None where no draw fell; up to
            their errors their mean is the NELBO.
        num_rows: N.
        num_documents: documents that the rows are from.
        num_tokens: tokens scored.
        num_draws: draws of each row.
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
        documents: token ids, integers [n] each.
        length: of a row.
        packed: documents follow one another within a row, as in pretraining; else every document
            begins a row.
        overlap: tokens, fewer than `length`, with which a row repeats the end of the row before. A
            row has more tokens than these.

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
) -> Evaluation:
    """Estimates the NELBO per token: an upper bound on the negative log-likelihood.

    Args:
        logits: tokens int64 [B, L] -> logits float [B, L, V] of the clean tokens, unshifted; see
            `LogitsInContext`.
        rows: what to score, all of them with documents or none.
        mask_token_id: id put at masked positions.
        draws: masks of each row, even.
        num_bins: bins of the rate.
        seed: of rates and masks; one seed, one number.
        batch_size: masked rows in a call of `logits`.
        device: of the tokens that `logits` takes.
        progress: called with the number of draws of each batch.

    Raises:
        UserError: nothing to score, an odd number of draws, a mask token among the rows, or logits
            that are no numbers.
    """
    if draws < 2 or draws % 2:
        raise UserError(f"the draws of a text must be even, for an error bar; got {draws}")
    groups = groups_of(rows)
    drawn = draw(
        logits, rows, mask_token_id, 2, draws // 2, seed, groups, batch_size, device, progress
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
    """How many documents the rows are from."""
    origins = [row.origin for row in rows if row.origin is not None]
    known = len(torch.cat(origins).unique()) if origins else 0
    return known + len(rows) - len(origins)


def groups_of(rows: Sequence[ScoredRow]) -> Integers:
    """The group of each row: those of one document share one.

    A row of several documents belongs to the one that it has most of.

    Args:
        rows: N of them.

    Returns:
        Numbers from 0 on, int64 [N], at most `GROUPS` of them; groups are about equally large where
        documents are small.
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
) -> list[tuple[float, float]]:
    """Conditional log-likelihoods of continuations: only these are masked, the contexts are seen.

    A continuation of n tokens has 2^n - 1 masks that hide any of them. If these are no more than
    `draws`, each is scored once and the bound is exact.

    Args:
        logits: as in `evaluate`.
        pairs: token ids of (context, continuation). A shifted model (--mdm-shift) needs a context,
            of one token at least.
        mask_token_id: id put at masked positions.
        draws: masks of each pair, a multiple of 4.
        seed: of rates and masks.
        batch_size: masked rows in a call of `logits`.
        device: of the tokens that `logits` takes.
        progress: called with the number of masks of each batch; see `num_masks`.

    Returns:
        For each pair an unbiased estimate of the lower bound on log p(continuation | context), nats
        over the whole continuation, and the standard error of the masking, 0 where it is exact.

    Raises:
        UserError: draws that are no multiple of 4, a mask token among the tokens, or logits that
            are no numbers.
    """
    if draws < 4 or draws % 4:
        raise UserError(f"the draws of a continuation must be a multiple of 4, got {draws}")
    rows = [
        ScoredRow(
            torch.tensor([*context, *continuation], dtype=torch.int64),
            torch.tensor([False] * len(context) + [True] * len(continuation)),
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
    )
    replicates = drawn.nats.mean(axis=2)
    bounds[many] = -replicates.mean(axis=1)
    errors[many] = replicates.std(axis=1, ddof=1) / math.sqrt(replicates.shape[1])
    return list(zip(bounds.tolist(), errors.tolist(), strict=True))


def num_masks(num_tokens: int, draws: int) -> int:
    """Counts the masks under which `log_likelihoods` scores a continuation."""
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
    """The NELBO of each row, its sum over tokens, over all masks; arguments as in `evaluate`.

    The rate t is uniform over (0, 1), and a masked token weighs 1/t. A mask that hides k of n
    tokens has the probability t^k (1 - t)^(n - k), so that each of its cross entropies CE weighs

        integral over t of  t^(k - 1) (1 - t)^(n - k)  =  1 / (k C(n, k))

    The sum over the 2^n - 1 masks that hide a token is what `draw` estimates. It has k uniform
    over 1 to n, one of the C(n, k) masks with equal chances, and the weight n / k.

    Returns:
        nats, float64 [N].

    Raises:
        UserError: a mask token among the tokens, or logits that are no numbers.
    """
    _check_tokens(rows, mask_token_id)
    places = [row.eligible.nonzero()[:, 0] for row in rows]  # of the n tokens
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
) -> Draws:
    """Scores every row under `replicates` x `draws` masks; arguments as in `evaluate`.

    `groups`, int64 [N], numbers the group that each row is in from 0 on (see `groups_of`). Only
    rows of one length share a call of the model, so nothing is padded.

    Raises:
        UserError: a mask token among the tokens, or logits that are no numbers.
    """
    corrupter = Corrupter(Uniform(), "exact-count", mask_token_id, eps=1e-3)  # eps plays no part
    _check_tokens(rows, mask_token_id)
    shape = (len(rows), replicates, draws)
    quantile = lattice_quantiles(groups, replicates, draws, seed).reshape(-1)
    nats, rate = np.zeros(quantile.shape), np.zeros(quantile.shape)
    per_row = replicates * draws
    lengths = [len(rows[job // per_row].tokens) for job in range(len(quantile))]
    for batch in _batches(lengths, batch_size):
        chosen = [rows[job // per_row] for job in batch]
        tokens = torch.stack([row.tokens for row in chosen])
        eligible = torch.stack([row.eligible for row in chosen])
        uniforms = [row_uniforms(seed, Split.TEST, job, tokens.shape[1]) for job in batch]
        corrupted = corrupter(
            tokens,
            eligible,
            torch.from_numpy(np.stack(uniforms)),
            torch.from_numpy(quantile[batch]),
        )
        cross_entropy = _cross_entropies(logits, chosen, corrupted.mask, mask_token_id, device)
        losses = row_losses(
            cross_entropy, corrupted.mask, corrupted.weight, eligible.sum(dim=1), "rows"
        )
        nats[batch] = (losses.per_row * eligible.sum(dim=1)).numpy()
        _check_finite(nats[batch])
        rate[batch] = corrupted.t.numpy()
        progress(len(batch))
    num_eligible = np.array([int(row.eligible.sum()) for row in rows], dtype=np.int64)
    return Draws(nats.reshape(shape), rate.reshape(shape), num_eligible)


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of rows of one length, at most `batch_size` of them: nothing is padded."""
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
    """Cross entropies of rows of one length where `mask`, bool [B, L], hides their tokens.

    Returns:
        nats, float64 [B, L] on the CPU, 0 where nothing is hidden.
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
        UserError: one does.
    """
    for number, row in enumerate(rows):
        if (row.tokens == mask_token_id).any():
            raise UserError(
                f"text {number} contains the mask token {mask_token_id}, which the model would "
                "take for a masked position: tokenize it again without"
            )


def _check_finite(nats: Floats) -> None:
    """Checks what rows cost.

    Raises:
        UserError: it is no number.
    """
    if not np.isfinite(nats).all():
        raise UserError(
            "the likelihood of a text is NaN or 0: the model's logits are no numbers, or "
            "too large for its precision"
        )


def lattice_quantiles(groups: Integers, replicates: int, draws: int, seed: int) -> Integers:
    """Quantiles of the rates: one golden-ratio lattice for each replicate of a group.

    The lattice runs through the draws of the group's rows one after the other, so that both the
    draws of one row and those of the whole group are stratified. Each quantile is uniform over
    (0, 1); those of different groups or replicates are independent.

    Args:
        groups: number of the group that each row is in, from 0 on, int64 [N].
        replicates: of each group.
        draws: of each row in a replicate.
        seed: of the offsets.

    Returns:
        Grid integers (see randomness.py), int64 [N, replicates, draws].
    """
    sizes = np.bincount(groups)
    place = np.empty_like(groups)  # of a row in its group
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
    """Ratio of sums over draws, nats to tokens, with linearised errors; None without any draw.

    Args:
        drawn: nats of N rows in R replicates of D draws.
        chosen: 1 for draws that count, else 0 [N, R, D].
        groups: number of each row's group [N].
    """
    tokens = np.broadcast_to(drawn.num_eligible[:, None, None], chosen.shape)
    # [G, R]: sums over the draws of a replicate and the rows of a group.
    nats, weight = np.zeros((2, groups.max() + 1, chosen.shape[1]))
    np.add.at(nats, groups, (chosen * drawn.nats).sum(axis=2))
    np.add.at(weight, groups, (chosen * tokens).sum(axis=2))
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
