"""Samples are uniform, have the requested size, and are a function of the seed."""

import numpy as np
from scipy import stats

from megatron_mdm.data import sampling
from megatron_mdm.data.sampling import Reservoir, drawn


def sample(sizes, enough, seed=0):
    reservoir, made = Reservoir(enough, seed), []

    def make(i):
        made.append(i)
        return (sizes[i], i) if sizes[i] else None

    for i in range(len(sizes)):
        reservoir.offer(lambda i=i: make(i))
    chosen = reservoir.items()
    assert reservoir.size == sum(sizes[i] for i in chosen)
    assert chosen == sorted(chosen)
    return chosen, made, reservoir


def test_every_item_is_as_likely_as_another():
    counts = np.zeros(50)
    for seed in range(600):
        chosen, _, _ = sample([1] * 50, 10, seed)
        assert len(chosen) == 10
        counts[chosen] += 1
    # The variance of a sample without replacement is 40/49 of that of independent draws.
    assert stats.chi2.sf(((counts - 120) ** 2 / 120).sum() * 50 / 40, 49) > 1e-3


def test_the_sample_reaches_the_size_and_ends_there():
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 9, 400).tolist()
    for enough in (1, 7, 100, 1000):
        chosen, made, reservoir = sample(sizes, enough)
        assert reservoir.size >= enough
        reservoir.shrink(reservoir.size - 1)  # removes only the item with the last key
        assert reservoir.size < enough and len(reservoir.items()) == len(chosen) - 1
        # Only n items and a share of the rest are made, because the others cannot be in the sample.
        assert len(made) < 4 * len(chosen) + 40
    everything, _, _ = sample(sizes, 10**6)
    assert everything == [i for i, size in enumerate(sizes) if size]
    assert sample([], 5)[0] == [] and sample([0, 0], 5)[0] == []


def test_an_item_larger_than_the_sample_is_as_likely_as_the_others():
    large = [100 in sample([1] * 100 + [1000], 20, seed)[0] for seed in range(400)]
    assert stats.binomtest(sum(large), 400, 20 / 101).pvalue > 1e-3


def test_another_seed_is_another_sample():
    samples = [tuple(sample([1] * 50, 10, seed)[0]) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]


# -- of items whose sizes are known


def test_known_sizes_give_the_same_sample(monkeypatch):
    """So a file of texts and its .bin are evaluated on the same documents."""
    sizes = np.random.default_rng(0).integers(1, 9, 400).astype(np.int32)
    for chunk in (7, 400, 2**20):
        monkeypatch.setattr(sampling, "CHUNK", chunk)
        for seed in (0, 1):
            for enough in (1, 7, 100, 1000, sizes.sum() - 1, sizes.sum(), 10**6):
                assert drawn(sizes, enough, seed) == sample(sizes.tolist(), enough, seed)[0]
    assert drawn(sizes[:0], 5) == []
