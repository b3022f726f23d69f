"""Megatron's index cache, keyed by the content of the data and rebuilt if it is damaged.

Megatron keys the cache by the name of the data. If data were replaced under their old name, they
would be read in the old order, which contains no new document. A full disk leaves a truncated file
in the cache, which would end every later start.
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
    """Megatron's dataset configuration, with keys for the content of the data.

    Attributes:
        cache_keys: maps the prefix of a .bin/.idx pair to a digest of its content.
    """

    cache_keys: dict[str, str] = field(default_factory=dict)


class KeyedIndex(GPTDataset):
    """GPTDataset whose cached index matches the content of the data, and is rebuilt if damaged."""

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
    """Megatron's mixture of datasets, whose cached index is rebuilt if it is damaged."""

    def _build_indices(self) -> Any:
        if self.config.path_to_cache:
            remove_damaged(self.config.path_to_cache, self.unique_description_hash)
        return super()._build_indices()


class DatasetBuilder(BlendedMegatronDatasetBuilder):
    """Megatron's builder, for `WholeBlendedDataset`, with cache files that are complete or absent.

    Otherwise runs that share a cache would read files that another run is still writing, or treat
    them as damaged.
    """

    def build(self) -> Any:
        """Builds the datasets of all parts of the data."""
        whole = _WholeFiles()
        with replaced(gpt_dataset, "numpy", whole), replaced(blended_dataset, "numpy", whole):
            return super().build()

    @staticmethod
    def build_generic_dataset(cls: Any, *args: Any) -> Any:  # Megatron's names
        """Builds a dataset; the first rank builds it before the others."""
        kind = WholeBlendedDataset if cls is BlendedDataset else cls
        return BlendedMegatronDatasetBuilder.build_generic_dataset(kind, *args)


class _WholeFiles:
    """NumPy, except that `save` writes an array under a temporary name and then renames it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def save(path: str, array: np.ndarray, **settings: Any) -> None:
        """Writes an array."""
        with complete_or_absent(path) as (name,), write_errors(path), open(name, "wb") as file:
            np.save(file, array, **settings)


def remove_damaged(directory: str, key: str) -> None:
    """Removes the truncated index files of a key, on the first rank.

    Megatron builds on this rank before any other, and rebuilds missing files.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    for path in glob(f"{escape(os.path.join(directory, key))}-*.npy"):
        try:
            np.load(path, mmap_mode="r")
        except (ValueError, EOFError):  # NumPy raises these for a truncated file
            os.unlink(path)
            notice(f"{path} was damaged, and is rebuilt")
