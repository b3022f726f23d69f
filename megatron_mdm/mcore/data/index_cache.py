"""Megatron's cache of indices, keyed by what the data hold, and made anew where it is damaged.

Megatron keys it by the name of the data: data that were replaced under their old name would be read
in the old order, of which no new document is part. A full disk leaves a file that is cut short,
which would end every later start.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from glob import escape, glob
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import blended_dataset, gpt_dataset
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_mdm.files import complete_or_absent, write_errors
from megatron_mdm.mcore.device import replaced
from megatron_mdm.mcore.ranks import notice


@dataclass
class KeyedDatasetConfig(GPTDatasetConfig):
    """Megatron's, and the keys of its data.

    Attributes:
        cache_keys: prefix of a .bin/.idx pair -> what tells its content.
    """

    cache_keys: dict[str, str] = field(default_factory=dict)


class KeyedIndex(GPTDataset):
    """Its index is that of data with this content, and is whole or made anew."""

    def _build_document_sample_shuffle_indices(self) -> Any:
        self.unique_identifiers["data"] = self.config.cache_keys.get(self.dataset_path)
        self.unique_description = json.dumps(
            self.unique_identifiers, indent=4, default=lambda thing: thing.unique_identifiers
        )
        self.unique_description_hash = hashlib.md5(
            self.unique_description.encode(), usedforsecurity=False
        ).hexdigest()
        directory = self.config.path_to_cache or os.path.join(
            self.dataset.path_prefix, "cache", f"{type(self).__name__}_indices"
        )
        remove_damaged(directory, self.unique_description_hash)
        return super()._build_document_sample_shuffle_indices()


class WholeBlendedDataset(BlendedDataset):
    """Megatron's mixture, whose index is whole or made anew."""

    def _build_indices(self) -> Any:
        if self.config.path_to_cache:
            remove_damaged(self.config.path_to_cache, self.unique_description_hash)
        return super()._build_indices()


class DatasetBuilder(BlendedMegatronDatasetBuilder):
    """Megatron's, for `WholeBlendedDataset`, with files that are there whole or not at all.

    Runs that share a cache would otherwise read, or take for damaged, what another one writes.
    """

    def build(self) -> Any:
        """Builds the datasets of all parts of the data."""
        whole = _WholeFiles()
        with replaced(gpt_dataset, "numpy", whole), replaced(blended_dataset, "numpy", whole):
            return super().build()

    @staticmethod
    def build_generic_dataset(cls: Any, *args: Any) -> Any:  # Megatron's names
        """Builds a dataset, on the first rank before the others."""
        kind = WholeBlendedDataset if cls is BlendedDataset else cls
        return BlendedMegatronDatasetBuilder.build_generic_dataset(kind, *args)


class _WholeFiles:
    """NumPy, except that an array is written under another name and then renamed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def save(path: str, array: np.ndarray, **settings: Any) -> None:
        """Writes an array."""
        with complete_or_absent(path) as (name,), write_errors(path), open(name, "wb") as file:
            np.save(file, array, **settings)


def remove_damaged(directory: str, key: str) -> None:
    """Removes the index files of a key that are cut short, on the first rank.

    Megatron builds on this rank before any other, and makes anew what is not there.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    for path in glob(f"{escape(os.path.join(directory, key))}-*.npy"):
        try:
            np.load(path, mmap_mode="r")
        except (ValueError, EOFError):  # NumPy's words for a file that is cut short
            os.unlink(path)
            notice(f"{path} was damaged, and is made anew")
