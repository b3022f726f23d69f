"""Rows of independent tokens, each row from a distribution of its own: the best loss is known.

A row draws the probabilities of its symbols from a Dirichlet distribution, and its tokens from
these. Where a token stands says nothing, and all seen tokens say equally much: nothing is local.
Given m seen tokens, c of which are the symbol v, the best prediction of a masked one is

    p(v) = (a + c) / (V a + m),    a the concentration, V the number of symbols.

Averaged over the number of masked tokens, 1 to L, its loss is the negative log-likelihood of a row.
"""

import pathlib

import numpy as np
from scipy import stats

from benchmarks.python_text import write_documents
from megatron_mdm.objective.rate_bins import count_weights
from megatron_mdm.objective.types import Floats, Integers

# Of the race. The first token of a row costs 3.47 nats, the last one of 64 costs 2.53.
SYMBOLS, CONCENTRATION = 32, 0.25


def make_rows(num: int, length: int, symbols: int, concentration: float, seed: int) -> Integers:
    """Draws rows, int64 [num, length].

    Args:
        num: of rows.
        length: L.
        symbols: V; tokens are 0 to V - 1.
        concentration: a; smaller ones make rows of fewer symbols.
        seed: of all that is drawn.
    """
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.full(symbols, concentration), num)
    counts = generator.multinomial(length, probabilities)
    rows = np.repeat(np.tile(np.arange(symbols), num), counts.ravel()).reshape(num, length)
    return generator.permuted(rows, axis=1)


def best_losses(length: int, symbols: int, concentration: float) -> Floats:
    """The best loss of a masked token where 0, 1, ... L - 1 others are seen, nats [L].

    A token's probability in its row has the density Beta(a + 1, (V - 1) a). Its count among m seen
    tokens is therefore beta-binomial.

    Args:
        length: L.
        symbols: V.
        concentration: a.
    """
    seen = np.arange(length)[:, None]
    count = np.arange(length)[None, :]  # of the masked token's symbol
    chances = stats.betabinom.pmf(count, seen, concentration + 1, (symbols - 1) * concentration)
    expected: Floats = (chances * np.log(concentration + count)).sum(axis=1)
    return np.log(symbols * concentration + seen[:, 0]) - expected


def best_losses_of(rows: Integers, symbols: int, concentration: float) -> Floats:
    """The same as `best_losses`, of given rows: the mean over these, and over all their masks.

    A symbol that a row has n times is one of its masked tokens and, among the m that are seen, as
    often as a hypergeometric draw says: m of L - 1 tokens, n - 1 of which are this symbol.

    Args:
        rows: int64 [N, L].
        symbols: V.
        concentration: a.
    """
    length = rows.shape[1]
    counts = (rows[:, :, None] == np.arange(symbols)).sum(axis=1)
    # Share of tokens whose symbol is in its row n times, n = 1 ... L.
    of_count = np.bincount(counts.ravel(), minlength=length + 1)[1:] * np.arange(1, length + 1)
    share = of_count / of_count.sum()
    present = share.nonzero()[0]  # n - 1
    seen = np.arange(length)[:, None, None]
    count = np.arange(length)
    chances = stats.hypergeom.pmf(count, length - 1, present[None, :, None], seen)
    expected: Floats = (chances * np.log(concentration + count)).sum(axis=2) @ share[present]
    return np.log(symbols * concentration + np.arange(length)) - expected


def per_bin(best: Floats, bins: int) -> Floats:
    """Means over equal bins of the rate t, with exact-count masks [bins].

    Args:
        best: of `best_losses`, by the number of seen tokens [L].
        bins: their number.
    """
    means = []
    for index in range(bins):
        masked, share = count_weights("exact-count", len(best), index, bins, eps=1e-3)
        means.append(float(best[len(best) - masked.astype(np.int64)] @ share))
    return np.array(means)


def held_out_rows(length: int, num: int) -> Integers:
    """The rows that runs are measured on, int64 [num, length]."""
    return make_rows(num, length, SYMBOLS, CONCENTRATION, seed=1)


def training_flags(directory: pathlib.Path, length: int, num: int) -> list[str]:
    """Writes so many rows to train on, and names them as flags."""
    rows = make_rows(num, length, SYMBOLS, CONCENTRATION, seed=2)
    return ["--train-data-path", str(_write(directory / f"unigram_{length}_{num}", rows))]


def held_out_flags(directory: pathlib.Path, length: int, num: int) -> list[str]:
    """Writes `held_out_rows`, and names them as flags."""
    rows = held_out_rows(length, num)
    return ["--valid-data-path", str(_write(directory / f"unigram_held_out_{length}", rows))]


def _write(prefix: pathlib.Path, rows: Integers) -> pathlib.Path:
    write_documents(prefix, [row.astype(np.uint8).tobytes() for row in rows])
    return prefix
