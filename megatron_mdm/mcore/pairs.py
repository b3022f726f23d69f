"""Rows for supervised fine-tuning: a prompt and its response each, from a Megatron dataset."""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split as MegatronSplit
from megatron.training.utils import print_rank_0

from megatron_mdm.errors import UserError


class PairDataset(MegatronDataset):
    """A row for each document of two sequences, as tools/preprocess_data.py writes pairs.

    Every epoch passes over all pairs in another order, a function of the seed alone. Pairs longer
    than a row are left out, and their number is printed.

    Raises:
        UserError: a document is no pair, or no pair is short enough.
    """

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str | None,
        indexed_indices: np.ndarray,
        num_samples: int | None,
        index_split: MegatronSplit,
        config: GPTDatasetConfig,
    ) -> None:
        super().__init__(
            indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config
        )
        bounds = indexed_dataset.document_indices
        if not np.array_equal(bounds, 2 * np.arange(len(bounds))):
            raise UserError(
                f"{dataset_path} does not consist of pairs of a prompt and a response, which "
                "--mdm-sft needs: make it with tools/preprocess_data.py --prompt-key or "
                "--messages-key"
            )
        lengths = indexed_dataset.sequence_lengths.reshape(-1, 2).sum(axis=1)[indexed_indices]
        fits = lengths <= config.sequence_length
        self.pairs: npt.NDArray[np.int64] = np.asarray(indexed_indices, dtype=np.int64)[fits]
        if num_samples != 0 and len(self.pairs) == 0:
            raise UserError(
                f"the {index_split.name} split of {dataset_path} has no pair of at most "
                f"--seq-length {config.sequence_length} tokens ({len(lengths)} in all): add data, "
                "change --split, or choose longer rows"
            )
        print_rank_0(
            f" > {index_split.name} split of {dataset_path}: {len(self.pairs)} pairs, "
            f"{len(lengths) - len(self.pairs)} left out, longer than {config.sequence_length}"
        )
        self._order = lru_cache(2)(self._shuffled)

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        """Pairs, which a split takes whole."""
        return len(low_level_dataset.document_indices) - 1

    build_low_level_dataset = staticmethod(GPTDataset.build_low_level_dataset)

    @property
    def texts_per_epoch(self) -> int:
        """Pairs that are not left out."""
        return len(self.pairs)

    def __len__(self) -> int:
        return max(len(self.pairs), self.num_samples or 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Tokens of the row int64 [L], undefined from `num_tokens` on; `num_prompt` come first."""
        epoch, place = divmod(int(index), len(self.pairs))
        pair = self.pairs[self._order(epoch)[place]]
        prompt, response = self.dataset.get(2 * pair), self.dataset.get(2 * pair + 1)
        tokens = np.zeros(self.config.sequence_length, dtype=np.int64)
        num_tokens = len(prompt) + len(response)
        tokens[:num_tokens] = np.concatenate([prompt, response])
        return {"tokens": tokens, "num_tokens": num_tokens, "num_prompt": len(prompt)}

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        seed = [self.config.random_seed, self.index_split.value, epoch]
        return np.random.default_rng(seed).permutation(len(self.pairs))
