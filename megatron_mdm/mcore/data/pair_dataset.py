"""Rows for supervised fine-tuning: pairs of a prompt and a response, from a Megatron dataset."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split as MegatronSplit
from megatron.training.utils import print_rank_0

from megatron_mdm.data.packing import pack
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.data.index_cache import KeyedDatasetConfig


@dataclass
class PairDatasetConfig(KeyedDatasetConfig):
    """Megatron's dataset configuration, with a setting of packed pairs.

    Attributes:
        response_multiple: the length of every response is padded to a multiple of it.
    """

    response_multiple: int = 1


class PairDataset(MegatronDataset):
    """One row per document of two sequences, the format of pairs from tools/preprocess_data.py.

    Every epoch passes over all rows in a different order, a function of the seed and the epoch.
    Pairs longer than a row are left out, and their number is printed.

    Raises:
        UserError: a document is not a pair, or no pair is short enough.
    """

    packs = False

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str | None,
        indexed_indices: np.ndarray,
        num_samples: int | None,
        index_split: MegatronSplit,
        config: PairDatasetConfig,
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
        self.multiple = config.response_multiple if self.packs else 1
        prompts, responses = indexed_dataset.sequence_lengths.reshape(-1, 2)[indexed_indices].T
        lengths = prompts + self._padded(responses)
        fits = lengths <= config.sequence_length
        self.pairs: npt.NDArray[np.int64] = np.asarray(indexed_indices, dtype=np.int64)[fits]
        if num_samples != 0 and len(self.pairs) == 0:
            raise UserError(
                f"the {index_split.name} split of {dataset_path} has no pair of at most "
                f"--seq-length {config.sequence_length} tokens ({len(lengths)} in all): add data, "
                "change --split, or choose longer rows"
            )
        # Row r has the pairs starts[r] to starts[r + 1] - 1.
        self.starts: npt.NDArray[np.int64] = np.arange(len(self.pairs) + 1)
        if self.packs and index_split is MegatronSplit.train and len(self.pairs):
            shuffled = self._permutation(len(self.pairs), epoch=0)
            order, self.starts = pack(lengths[fits][shuffled], config.sequence_length)
            self.pairs = self.pairs[shuffled[order]]
        padded = f" padded to multiples of {self.multiple}," if self.multiple > 1 else ""
        print_rank_0(
            f" > {index_split.name} split of {dataset_path}: {len(self.pairs)} pairs,{padded} "
            f"{len(lengths) - len(self.pairs)} left out, longer than {config.sequence_length}, in "
            f"{self.texts_per_epoch} rows"
        )
        self._order = lru_cache(2)(lambda epoch: self._permutation(self.texts_per_epoch, epoch))

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        """The number of pairs. Megatron's split never divides a pair."""
        return len(low_level_dataset.document_indices) - 1

    build_low_level_dataset = staticmethod(GPTDataset.build_low_level_dataset)

    @property
    def texts_per_epoch(self) -> int:
        """The number of rows."""
        return len(self.starts) - 1

    def __len__(self) -> int:
        return max(self.texts_per_epoch, self.num_samples or 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row.

        `tokens`, int64 [L], are end-of-document tokens from `num_tokens` on. `prompt`, bool [L], is
        true at the tokens of prompts. `document`, int64 [L], is the number of each token's pair in
        the row. `text` is the number of the row, the same in every epoch.
        """
        epoch, place = divmod(int(index), self.texts_per_epoch)
        row = self._order(epoch)[place]
        length = self.config.sequence_length
        tokens = np.full(length, self.config.tokenizer.eod, dtype=np.int64)
        document = np.zeros(length, dtype=np.int64)
        is_prompt = np.zeros(length, dtype=bool)
        end = 0
        for number, pair in enumerate(self.pairs[self.starts[row] : self.starts[row + 1]]):
            prompt, response = self.dataset.get(2 * pair), self.dataset.get(2 * pair + 1)
            start, end = end, end + len(prompt) + self._padded(len(response))
            pair_tokens = np.concatenate([prompt, response])
            tokens[start : start + len(pair_tokens)] = pair_tokens
            is_prompt[start : start + len(prompt)] = True
            document[start:] = number
        return {
            "tokens": tokens,
            "num_tokens": end,
            "prompt": is_prompt,
            "document": document,
            "text": row,
        }

    def _padded(self, length: Any) -> Any:
        """Lengths of responses with their padding; `length` is an array or a number."""
        return -(-length // self.multiple) * self.multiple

    def _permutation(self, count: int, epoch: int) -> npt.NDArray[np.int64]:
        seed = [self.config.random_seed, self.index_split.value, epoch]
        return np.random.default_rng(seed).permutation(count)


class PackedPairDataset(PairDataset):
    """Packs as many pairs as fit into each training row; evaluation rows hold one pair.

    In training and in evaluations, each response is extended with end-of-document tokens until its
    length is a multiple of `config.response_multiple`. These tokens belong to the pair and are not
    padding.

    The packing is a function of the data and the seed, and the same in every epoch. Pairs do not
    attend to each other, so the packing affects only how well the rows are filled.
    """

    packs = True
