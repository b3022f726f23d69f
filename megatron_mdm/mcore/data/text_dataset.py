"""Rows of packed documents, from Megatron's GPTDataset.

Splitting, document order and the index cache stay Megatron's.
"""

from functools import cached_property, lru_cache
from math import gcd
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split as MegatronSplit

from megatron_mdm.errors import UserError
from megatron_mdm.mcore.data.index_cache import KeyedIndex
from megatron_mdm.objective.randomness import Purpose, Split, random_bits

SPLITS = {
    MegatronSplit.train: Split.TRAIN,
    MegatronSplit.valid: Split.VALID,
    MegatronSplit.test: Split.TEST,
}


class _CleanTokens:
    """Returns rows as tokens and their number, without GPTDataset's shifted labels and causal mask.

    GPTDataset overwrites every token that equals the tokenizer's padding id with 0. Many tokenizers
    pad with the end-of-document token, so this would destroy their end-of-document tokens.
    """

    def __getitem__(self: Any, index: int) -> dict[str, Any]:
        tokens, _, lengths = self._query_document_sample_shuffle_indices(index)
        return {"tokens": tokens.astype(np.int64), "num_tokens": sum(lengths)}


class CleanTokensDataset(_CleanTokens, KeyedIndex):
    """Rows in Megatron's order, which depends on the length of the run (--mdm-row-order run).

    Raises:
        UserError: the data have fewer tokens than one row. (Megatron would repeat the tokens inside
            one row, and loop forever if there are none.)
    """

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str | None,
        indexed_indices: np.ndarray | None,
        num_samples: int | None,
        index_split: MegatronSplit,
        config: GPTDatasetConfig,
    ) -> None:
        # Without indices (--dataloader-fast-cache-load) an earlier run built and checked the rows.
        if num_samples != 0 and indexed_indices is not None:
            tokens = int(indexed_dataset.sequence_lengths[indexed_indices].sum())
            if tokens < config.sequence_length:
                raise UserError(
                    f"the {index_split.name} split of {dataset_path} has {tokens} tokens, fewer "
                    f"than one row of --seq-length {config.sequence_length}: add data, change "
                    "--split, or choose shorter rows"
                )
        super().__init__(
            indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config
        )

    @property
    def texts_per_epoch(self) -> int:
        """The number of complete rows in one epoch."""
        return self._get_num_tokens_per_epoch() // self.config.sequence_length


class _Epoch(NamedTuple):
    """The order and the shift of one epoch of n rows over a ring of tokens.

    Attributes:
        stride, start: row i of the epoch is number (start + i stride) mod n of the shuffled order.
        shift: number of tokens by which all rows are shifted along the ring.
    """

    stride: int
    start: int
    shift: int


class EpochDataset(CleanTokensDataset):
    """Rows whose order in each epoch does not depend on the run's length (--mdm-row-order epoch).

    The documents, in Megatron's shuffled order of one epoch, form a ring of T tokens. An epoch has
    n = T // L rows of L tokens. Each epoch has a different row order, and cuts the ring into rows
    at different positions, so the unused remainder (less than a row) is also in a different place.
    If T is a multiple of L, as in data that was packed into rows, the cuts stay the same.

    Evaluations pass over the same rows in every epoch.
    """

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str | None,
        indexed_indices: np.ndarray | None,
        num_samples: int | None,
        index_split: MegatronSplit,
        config: GPTDatasetConfig,
    ) -> None:
        # For Megatron None means one epoch. Its cache then serves runs of any length.
        size = None if num_samples else num_samples
        super().__init__(indexed_dataset, dataset_path, indexed_indices, size, index_split, config)
        self.num_rows = num_samples or 0
        self._epoch = lru_cache(2)(self._make_epoch)

    @cached_property
    def texts_per_epoch(self) -> int:
        """The number of complete rows in one epoch."""
        return super().__len__()

    def __len__(self) -> int:
        return max(self.texts_per_epoch, self.num_rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row; in evaluations `text` identifies the same tokens in every epoch."""
        self._load_index()
        n, length = self.texts_per_epoch, self.config.sequence_length
        number, place = divmod(int(index), n)
        epoch = self._epoch(number if self.index_split is MegatronSplit.train else 0)
        text = int(self.shuffle_index[(epoch.start + place * epoch.stride) % n])
        tokens = self._read((epoch.shift + text * length) % self._ring, length)
        return {"tokens": tokens, "num_tokens": length, "text": text}

    def _make_epoch(self, number: int) -> _Epoch:
        seed, split = self.config.random_seed, SPLITS[self.index_split]
        words = random_bits(seed, split, Purpose.EPOCH, number, 130).tolist()
        n, length, ring = self.texts_per_epoch, self.config.sequence_length, self._ring
        start, shift, *candidates = words
        # Any stride that is coprime to n reaches every row.
        stride = next((word % n for word in candidates if gcd(word % n, n) == 1), 1)
        shift = shift % ring if ring % length else shift % n * length
        return _Epoch(stride, start % n, shift if self.index_split is MegatronSplit.train else 0)

    def _load_index(self) -> None:
        if self.shuffle_index is None:  # --dataloader-defer-npy-index-mmap
            self._query_document_sample_shuffle_indices(0)

    @cached_property
    def _ring(self) -> int:
        """The number of tokens in one epoch, T."""
        document, offset = map(int, self.sample_index[-1])
        rest = self.dataset.sequence_lengths[self.document_index[document:]].sum()
        return self.texts_per_epoch * self.config.sequence_length + int(rest) - offset

    def _read(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Reads `count` tokens of the ring, beginning at token `first`."""
        row, skipped = divmod(first, self.config.sequence_length)
        document, offset = map(int, self.sample_index[row])
        offset += skipped
        parts = []
        while count:
            identifier = self.document_index[document]
            available = int(self.dataset.sequence_lengths[identifier]) - offset
            if available > 0:
                taken = min(count, available)
                parts.append(self.dataset.get(identifier, offset=offset, length=taken))
                count -= taken
            offset = max(0, -available)
            document = (document + 1) % len(self.document_index)
        return np.concatenate(parts, dtype=np.int64)


class MockCleanTokensDataset(_CleanTokens, MockGPTDataset):
    """Rows of Megatron's synthetic data, for --mock-data."""
