"""Small data sets that a model can learn from, and functions that write them."""

from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

from tests.ranks.flags import EOD_ID


def write_documents(prefix: Path, documents: list[list[int]]) -> None:
    """Writes a .bin/.idx pair of these documents."""
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=np.int32)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(get_idx_path(str(prefix)))


def write_pairs(prefix: Path, pairs: list[tuple[list[int], list[int]]]) -> None:
    """Writes a .bin/.idx pair of prompts and responses, as tools/preprocess_data.py does."""
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=np.int32)
    for prompt, response in pairs:
        builder.add_document([*prompt, *response], [len(prompt), len(response)])
    builder.finalize(get_idx_path(str(prefix)))


def random_pairs(count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Prompts of tokens below 50; responses of larger tokens that end with an end of document."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        prompt = rng.integers(3, 50, size=rng.integers(0, 14)).tolist()
        response = rng.integers(50, 100, size=rng.integers(1, 16)).tolist()
        pairs.append((prompt, [*response, EOD_ID]))
    return pairs


def random_documents(count: int, seed: int = 0) -> list[list[int]]:
    """Documents of 5 to 60 tokens that a model can learn, each ending with an end of document."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        start, step, length = rng.integers(3, 100), rng.integers(1, 4), rng.integers(4, 60)
        documents.append([*((start + step * np.arange(length)) % 100 + 3).tolist(), EOD_ID])
    return documents
