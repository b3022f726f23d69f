"""Rows of independent tokens whose best loss is known; each row has its own distribution.

Each row draws the probabilities of its symbols from a Dirichlet distribution, and its tokens from
these probabilities. Positions carry no information, and all visible tokens carry the same amount,
so there is no local structure. Given m visible tokens, c of which are the symbol v, the best
prediction of a masked token is

    p(v) = (a + c) / (V a + m),    a the concentration, V the number of symbols.

Its loss, averaged over the number of masked tokens from 1 to L, is the negative log-likelihood of a
row.
"""

import pathlib

import numpy as np
from scipy import stats

from benchmarks.python_text import write_documents
from megatron_mdm.objective.rate_bins import count_weights
from megatron_mdm.objective.types import Floats, Integers

# The values of the race. The first token of a row costs 3.47 nats, the last one of 64 costs 2.53.
SYMBOLS, CONCENTRATION = 32, 0.25


def make_rows(num: int, length: int, symbols: int, concentration: float, seed: int) -> Integers:
    """Draws rows, int64 [num, length].

    Args:
        num: number of rows.
        length: L.
        symbols: V; tokens are 0 to V - 1.
        concentration: a; a smaller value gives rows with fewer different symbols.
        seed: seed of all draws.
    """
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.full(symbols, concentration), num)
    counts = generator.multinomial(length, probabilities)
    rows = np.repeat(np.tile(np.arange(symbols), num), counts.ravel()).reshape(num, length)
    return generator.permuted(rows, axis=1)


def best_losses(length: int, symbols: int, concentration: float) -> Floats:
    """Returns the best loss of a masked token given 0, 1, ... L - 1 visible tokens, in nats [L].

    The probability of a token's symbol in its row has the density Beta(a + 1, (V - 1) a). Therefore
    the count of the symbol among m visible tokens is beta-binomial.

    Args:
        length: L.
        symbols: V.
        concentration: a.
    """
    seen = np.arange(length)[:, None]
    count = np.arange(length)[None, :]  # visible tokens with the masked token's symbol
    chances = stats.betabinom.pmf(count, seen, concentration + 1, (symbols - 1) * concentration)
    expected: Floats = (chances * np.log(concentration + count)).sum(axis=1)
    return np.log(symbols * concentration + seen[:, 0]) - expected


def best_losses_of(rows: Integers, symbols: int, concentration: float) -> Floats:
    """Returns the same as `best_losses` for given rows: the mean over the rows and all their masks.

    If the symbol of a masked token occurs n times in its row, its count among the m visible tokens
    is hypergeometric: m draws from L - 1 tokens, n - 1 of which are this symbol.

    Args:
        rows: int64 [N, L].
        symbols: V.
        concentration: a.
    """
    length = rows.shape[1]
    counts = (rows[:, :, None] == np.arange(symbols)).sum(axis=1)
    # Share of tokens whose symbol occurs n times in the row, n = 1 ... L.
    of_count = np.bincount(counts.ravel(), minlength=length + 1)[1:] * np.arange(1, length + 1)
    share = of_count / of_count.sum()
    present = share.nonzero()[0]  # n - 1
    seen = np.arange(length)[:, None, None]
    count = np.arange(length)
    chances = stats.hypergeom.pmf(count, length - 1, present[None, :, None], seen)
    expected: Floats = (chances * np.log(concentration + count)).sum(axis=2) @ share[present]
    return np.log(symbols * concentration + np.arange(length)) - expected


def per_bin(best: Floats, bins: int) -> Floats:
    """Averages the best loss over equal bins of the rate t, for exact-count masks [bins].

    Args:
        best: result of `best_losses`, by the number of visible tokens [L].
        bins: number of bins.
    """
    means = []
    for index in range(bins):
        masked, share = count_weights("exact-count", len(best), index, bins, eps=1e-3)
        means.append(float(best[len(best) - masked.astype(np.int64)] @ share))
    return np.array(means)


def held_out_rows(length: int, num: int) -> Integers:
    """Makes the held-out rows that runs are measured on, int64 [num, length]."""
    return make_rows(num, length, SYMBOLS, CONCENTRATION, seed=1)


def training_flags(directory: pathlib.Path, length: int, num: int) -> list[str]:
    """Writes `num` training rows; returns their flags."""
    rows = make_rows(num, length, SYMBOLS, CONCENTRATION, seed=2)
    return ["--train-data-path", str(_write(directory / f"unigram_{length}_{num}", rows))]


def held_out_flags(directory: pathlib.Path, length: int, num: int) -> list[str]:
    """Writes `held_out_rows`; returns their flags."""
    rows = held_out_rows(length, num)
    return ["--valid-data-path", str(_write(directory / f"unigram_held_out_{length}", rows))]


def _write(prefix: pathlib.Path, rows: Integers) -> pathlib.Path:
    write_documents(prefix, [row.astype(np.uint8).tobytes() for row in rows])
    return prefix
