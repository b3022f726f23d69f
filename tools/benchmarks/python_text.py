"""The source of Python's standard library as bytes, a text that every machine has."""

import pathlib
import sysconfig
from collections.abc import Iterable
from typing import TYPE_CHECKING

from megatron_mdm.files import complete_or_absent

if TYPE_CHECKING:
    import torch

MASK = 256  # beside the 256 bytes
VOCABULARY = MASK + 1


def modules() -> list[bytes]:
    """The texts of the library's modules; packages are left out."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    return [path.read_bytes() for path in sorted(root.glob("*.py"))]


def rows(length: int, seed: int) -> "torch.Tensor":
    """All modules one after the other, cut into rows, which are shuffled: int64 [N, length]."""
    import torch

    data = torch.frombuffer(bytearray(b"".join(modules())), dtype=torch.uint8).long()
    cut = data[: len(data) // length * length].view(-1, length)
    return cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed))]


def write_data(directory: pathlib.Path) -> None:
    """Writes the modules as a Megatron dataset, `text` in the directory, each as a document."""
    write_documents(directory / "text", [text for text in modules() if text])


def write_documents(prefix: pathlib.Path, texts: Iterable[bytes]) -> None:
    """Writes texts that are not empty as a Megatron dataset, each as a document.

    Files that have these texts already are left alone: a run may be reading them.
    """
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    texts = list(texts)
    if IndexedDataset.exists(str(prefix)):
        data = np.frombuffer(b"".join(texts), np.uint8)
        kept = IndexedDataset(str(prefix))  # its arrays end with it
        is_same = np.array_equal(np.fromfile(f"{prefix}.bin", np.uint16), data)
        if is_same and np.array_equal(kept.sequence_lengths, [len(text) for text in texts]):
            return
    with complete_or_absent(f"{prefix}.bin", f"{prefix}.idx") as (tokens, index):
        builder = IndexedDatasetBuilder(tokens, dtype=np.uint16)
        for text in texts:
            values = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int16)
            builder.add_document(values, [len(text)])
        builder.finalize(index)
