"""The source code of Python's standard library as bytes: a text that every machine has."""

import pathlib
import sysconfig
from collections.abc import Iterable
from typing import TYPE_CHECKING

from megatron_mdm.files import complete_or_absent

if TYPE_CHECKING:
    import torch

MASK = 256  # the first id after the 256 bytes
VOCABULARY = MASK + 1


def modules() -> list[bytes]:
    """Returns the texts of the library's top-level modules, without packages."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    return [path.read_bytes() for path in sorted(root.glob("*.py"))]


def rows(length: int, seed: int) -> "torch.Tensor":
    """Concatenates all modules, cuts them into rows and shuffles the rows: int64 [N, length]."""
    import torch

    data = torch.frombuffer(bytearray(b"".join(modules())), dtype=torch.uint8).long()
    cut = data[: len(data) // length * length].view(-1, length)
    return cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed))]


def write_data(directory: pathlib.Path) -> None:
    """Writes the Megatron dataset `text` into a directory, with a document for each module."""
    write_documents(directory / "text", [text for text in modules() if text])


def write_documents(prefix: pathlib.Path, texts: Iterable[bytes]) -> None:
    """Writes non-empty texts as a Megatron dataset, with a document for each text.

    If the files hold these texts already, they are not written again, since a run may be reading
    them.
    """
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    texts = list(texts)
    if IndexedDataset.exists(str(prefix)):
        data = np.frombuffer(b"".join(texts), np.uint8)
        kept = IndexedDataset(str(prefix))  # keeps its memory-mapped arrays alive
        is_same = np.array_equal(np.fromfile(f"{prefix}.bin", np.uint16), data)
        if is_same and np.array_equal(kept.sequence_lengths, [len(text) for text in texts]):
            return
    with complete_or_absent(f"{prefix}.bin", f"{prefix}.idx") as (tokens, index):
        builder = IndexedDatasetBuilder(tokens, dtype=np.uint16)
        for text in texts:
            values = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int16)
            builder.add_document(values, [len(text)])
        builder.finalize(index)
