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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatron_mdm.errors import UserError
from megatron_mdm.objective.corruption import Corrupter
from megatron_mdm.objective.loss import row_losses
from megatron_mdm.objective.randomness import (
    GRID_BITS,
    PHI64,
    Purpose,
    Split,
    random_bits,
    row_uniforms,
)
from megatron_mdm.objective.samplers import Uniform

Floats = npt.NDArray[np.float64]
# Tokens int64 [B, L] -> logits float [B, L, V]. Where texts have documents it also gets, by name,
# `clean`, the tokens before masking, and `documents`, both int64 [B, L].
LogitsFunction = Callable[..., torch.Tensor]
GROUPS = 64  # at most; enough for an error bar to be known to a tenth


@dataclass(frozen=True)
class Text:
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
    """What N texts cost in R replicates of D draws.

    Attributes:
        nats: unbiased estimates of a text's NELBO, its sum over tokens, float64 [N, R, D].
        rate: masking rate t of each [N, R, D].
        num_eligible: tokens scored, int64 [N].
    """

    nats: Floats
    rate: Floats
    num_eligible: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A number with its standard errors (see the module).

    `stderr` is None where a single group of texts has draws; `draw_stderr` needs draws in all
    replicates, and so means nothing for a bin of few draws.
    """

    value: float
    stderr: float | None
    draw_stderr: float


@dataclass(frozen=True)
class Evaluation:
    """The NELBO of texts.

    Attributes:
        nelbo: nats per token, all tokens counting alike.
        bins: nats per token at rates in each equal bin of (0, 1], None where no draw fell; up to
            their errors their mean is the NELBO.
        num_texts: N.
        num_documents: documents that the texts are from.
        num_tokens: tokens scored.
        num_draws: draws of each text.
    """

    nelbo: Estimate
    bins: list[Estimate | None]
    num_texts: int
    num_documents: int
    num_tokens: int
    num_draws: int


def cut_rows(
    documents: Iterable[Sequence[int]], length: int, packed: bool, overlap: int = 0
) -> list[torch.Tensor]:
    """Cuts documents into rows of at most `length` tokens, without padding.

    Args:
        documents: token ids.
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
    logits: LogitsFunction,
    texts: Sequence[Text],
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
            `LogitsFunction`.
        texts: what to score, all of them with documents or none.
        mask_token_id: id put at masked positions.
        draws: masks of each text, even.
        num_bins: bins of the rate.
        seed: of rates and masks; one seed, one number.
        batch_size: masked rows in a call of `logits`.
        device: of the tokens that `logits` takes.
        progress: called with the number of draws of each batch.

    Raises:
        UserError: nothing to score, an odd number of draws, a mask token among the texts, or logits
            that are no numbers.
    """
    if draws < 2 or draws % 2:
        raise UserError(f"the draws of a text must be even, for an error bar; got {draws}")
    groups = groups_of(texts)
    drawn = draw(
        logits, texts, mask_token_id, 2, draws // 2, seed, groups, batch_size, device, progress
    )
    tokens = int(drawn.num_eligible.sum())
    if tokens == 0:
        raise UserError("there are no tokens to score: give other texts")
    everything = np.ones_like(drawn.nats)
    index = np.ceil(drawn.rate * num_bins) - 1
    bins = [_estimate(drawn, (index == i).astype(np.float64), groups) for i in range(num_bins)]
    nelbo = _estimate(drawn, everything, groups)
    assert nelbo is not None
    return Evaluation(nelbo, bins, len(texts), num_documents(texts), tokens, draws)


def num_documents(texts: Sequence[Text]) -> int:
    """How many documents texts are from."""
    origins = [text.origin for text in texts if text.origin is not None]
    known = len(torch.cat(origins).unique()) if origins else 0
    return known + len(texts) - len(origins)


def groups_of(texts: Sequence[Text]) -> npt.NDArray[np.int64]:
    """The group of each text: those of one document share one.

    A text of several documents belongs to the one that it has most of.

    Args:
        texts: N of them.

    Returns:
        Numbers from 0 on, int64 [N], at most `GROUPS` of them; groups are about equally large where
        documents are small.
    """
    documents = [
        -1 - i if text.origin is None else int(text.origin.mode().values)
        for i, text in enumerate(texts)
    ]
    _, document, counts = np.unique(documents, return_inverse=True, return_counts=True)
    before = counts.cumsum() - counts
    part = before * GROUPS // max(len(texts), 1)
    return np.unique(part[document], return_inverse=True)[1].astype(np.int64)


def log_likelihoods(
    logits: LogitsFunction,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    mask_token_id: int,
    draws: int = 32,
    seed: int = 0,
    batch_size: int = 16,
    device: torch.device | str | int = "cpu",
) -> list[tuple[float, float]]:
    """Conditional log-likelihoods of continuations: only these are masked, the contexts are seen.

    Args:
        logits: as in `evaluate`.
        pairs: token ids of (context, continuation). A shifted model (--mdm-shift) needs a context,
            of one token at least.
        mask_token_id: id put at masked positions.
        draws: masks of each pair, a multiple of 4.
        seed: of rates and masks.
        batch_size: masked rows in a call of `logits`.
        device: of the tokens that `logits` takes.

    Returns:
        For each pair an unbiased estimate of the lower bound on log p(continuation | context), nats
        over the whole continuation, and the standard error of the masking. Continuations of one
        token are exact.

    Raises:
        UserError: draws that are no multiple of 4, a mask token among the tokens, or logits that
            are no numbers.
    """
    if draws < 4 or draws % 4:
        raise UserError(f"the draws of a continuation must be a multiple of 4, got {draws}")
    texts = [
        Text(
            torch.tensor([*context, *continuation], dtype=torch.int64),
            torch.tensor([False] * len(context) + [True] * len(continuation)),
        )
        for context, continuation in pairs
    ]
    alone = np.arange(len(texts))
    drawn = draw(logits, texts, mask_token_id, 4, draws // 4, seed, alone, batch_size, device)
    replicates = drawn.nats.mean(axis=2)
    errors = replicates.std(axis=1, ddof=1) / math.sqrt(replicates.shape[1])
    return list(zip((-replicates.mean(axis=1)).tolist(), errors.tolist(), strict=True))


@torch.no_grad()
def draw(
    logits: LogitsFunction,
    texts: Sequence[Text],
    mask_token_id: int,
    replicates: int,
    draws: int,
    seed: int,
    groups: npt.NDArray[np.int64],
    batch_size: int,
    device: torch.device | str | int = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> Draws:
    """Scores every text under `replicates` x `draws` masks; arguments as in `evaluate`.

    `groups`, int64 [N], numbers the group that each text is in from 0 on (see `groups_of`). Only
    rows of one length share a call of the model, so nothing is padded.

    Raises:
        UserError: a mask token among the tokens, or logits that are no numbers.
    """
    corrupter = Corrupter(Uniform(), "exact-count", mask_token_id, eps=1e-3)  # eps plays no part
    for number, text in enumerate(texts):
        if (text.tokens == mask_token_id).any():
            raise UserError(
                f"text {number} contains the mask token {mask_token_id}, which the model would "
                "take for a masked position: tokenize it again without"
            )
    shape = (len(texts), replicates, draws)
    quantile = lattice_quantiles(groups, replicates, draws, seed).reshape(-1)
    nats, rate = np.zeros(quantile.shape), np.zeros(quantile.shape)
    per_text = replicates * draws
    length = [len(text.tokens) for text in texts]
    jobs = sorted(range(len(quantile)), key=lambda job: length[job // per_text])
    for _, same in itertools.groupby(jobs, key=lambda job: length[job // per_text]):
        for batch in itertools.batched(same, batch_size):
            chosen = [texts[job // per_text] for job in batch]
            tokens = torch.stack([text.tokens for text in chosen])
            eligible = torch.stack([text.eligible for text in chosen])
            uniforms = [row_uniforms(seed, Split.TEST, job, tokens.shape[1]) for job in batch]
            indices = list(batch)
            corrupted = corrupter(
                tokens,
                eligible,
                torch.from_numpy(np.stack(uniforms)),
                torch.from_numpy(quantile[indices]),
            )
            context = {}
            if chosen[0].documents is not None:
                documents = torch.stack([text.documents for text in chosen])
                context = {"clean": tokens.to(device), "documents": documents.to(device)}
            scores = logits(corrupted.tokens.to(device), **context)[corrupted.mask.to(device)]
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            masked = torch.nn.functional.cross_entropy(
                scores, tokens[corrupted.mask].to(device), reduction="none"
            )
            cross_entropy = torch.zeros(tokens.shape, dtype=torch.float64)
            cross_entropy[corrupted.mask] = masked.double().cpu()
            losses = row_losses(
                cross_entropy, corrupted.mask, corrupted.weight, eligible.sum(dim=1), "rows"
            )
            nats[indices] = (losses.per_row * eligible.sum(dim=1)).numpy()
            if not np.isfinite(nats[indices]).all():
                raise UserError(
                    "the likelihood of a text is NaN or 0: the model's logits are no numbers, or "
                    "too large for its precision"
                )
            rate[indices] = corrupted.t.numpy()
            progress(len(batch))
    num_eligible = np.array([int(text.eligible.sum()) for text in texts], dtype=np.int64)
    return Draws(nats.reshape(shape), rate.reshape(shape), num_eligible)


def lattice_quantiles(
    groups: npt.NDArray[np.int64], replicates: int, draws: int, seed: int
) -> npt.NDArray[np.int64]:
    """Quantiles of the rates: one golden-ratio lattice for each replicate of a group.

    The lattice runs through the draws of the group's texts one after the other, so that both the
    draws of one text and those of the whole group are stratified. Each quantile is uniform over
    (0, 1); those of different groups or replicates are independent.

    Args:
        groups: number of the group that each text is in, from 0 on, int64 [N].
        replicates: of each group.
        draws: of each text in a replicate.
        seed: of the offsets.

    Returns:
        Grid integers (see randomness.py), int64 [N, replicates, draws].
    """
    sizes = np.bincount(groups)
    place = np.empty_like(groups)  # of a text in its group
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
    quantile: npt.NDArray[np.int64] = (words >> np.uint64(64 - GRID_BITS)).astype(np.int64)
    return quantile


def _estimate(drawn: Draws, chosen: Floats, groups: npt.NDArray[np.int64]) -> Estimate | None:
    """Ratio of sums over draws, nats to tokens, with linearised errors; None without any draw.

    Args:
        drawn: nats of N texts in R replicates of D draws.
        chosen: 1 for draws that count, else 0 [N, R, D].
        groups: number of each text's group [N].
    """
    tokens = np.broadcast_to(drawn.num_eligible[:, None, None], chosen.shape)
    # [G, R]: sums over the draws of a replicate and the texts of a group.
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
