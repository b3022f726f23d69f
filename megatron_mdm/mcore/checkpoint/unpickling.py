"""Checks a checkpoint's pickles against a list of allowed classes before other code reads them.

A pickle can call any function while it is read. PyTorch reads `.metadata`, and every object that is
not a tensor, without restrictions. Megatron's own list of harmless classes does not apply there.
"""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import megatron.core  # noqa: F401  (tells torch.load which classes of Megatron's are harmless)
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_mdm.errors import UserError

METADATA = ".metadata"  # or __0.metadata, which holds the metadata of one rank only
COMMON = "common.pt"  # unsharded state, written by earlier versions of Megatron
OF_RANKS = "mp_rank_*/*.pt"  # files of Megatron's `torch` format

_DCP = "torch.distributed.checkpoint"
# Classes that only hold data, and functions that only look something up.
ALLOWED = {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((f"{_DCP}.metadata", name) for name in ("BytesStorageMetadata", "TensorStorageMetadata")),
    *((f"{_DCP}.metadata", name) for name in ("ChunkStorageMetadata", "TensorProperties")),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    *((f"{_DCP}.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    # Save plans, which Megatron stores with --ckpt-assume-constant-structure.
    *((f"{_DCP}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType")),
    *((f"{_DCP}.planner", name) for name in ("TensorWriteData", "BytesIOWriteData")),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
    *(("builtins", name) for name in ("set", "frozenset")),
}


def check_pickles(directory: Path) -> None:
    """Checks that reading the pickles of a checkpoint runs no code.

    Args:
        directory: directory of one checkpoint. It need not exist.

    Raises:
        UserError: a file holds a forbidden class or function, and the line names both; or a file is
            damaged.
    """
    if not directory.is_dir():
        return
    for path in sorted(directory.iterdir()):
        if path.name.endswith(METADATA):
            _check_objects(path, read_metadata(path))
    for path in sorted((*directory.glob(COMMON), *directory.glob(OF_RANKS))):
        _check_saved(path, str(path))


class _MetadataUnpickler(pickle.Unpickler):
    """Reads only the classes that PyTorch writes into `.metadata`."""

    def find_class(self, module: str, name: str) -> Any:
        """Overrides `pickle.Unpickler.find_class`.

        Raises:
            _NotAllowedError: the class or function is not on the list.
        """
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in ALLOWED and not is_dtype:
            raise _NotAllowedError(f"{module}.{name}")
        return super().find_class(module, name)


class _NotAllowedError(Exception):
    """The name of a class or function that a pickle must not hold."""


class DamagedError(UserError):
    """A file of a checkpoint is truncated or has other contents than expected."""


def read_metadata(path: Path) -> Metadata:
    """The contents of a `.metadata` file, read safely.

    Raises:
        UserError: it holds a class or function that could run code.
        DamagedError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except _NotAllowedError as error:
        raise _refusal(path, str(error)) from error
    except Exception as error:  # damaged bytes can raise any exception
        raise _damage(path, error) from error
    if not isinstance(metadata, Metadata):
        raise _refusal(path, type(metadata).__name__)
    return metadata


def _check_objects(path: Path, metadata: Metadata) -> None:
    """Checks every object that is not a tensor. PyTorch unpickles such objects when it loads them.

    Args:
        path: path of the `.metadata` file.
        metadata: its contents.

    Raises:
        UserError: see `check_pickles`.
    """
    try:
        objects = [
            (path.parent / info.relative_path, info.offset, info.length, info.transform_descriptors)
            for index, info in metadata.storage_data.items()
            if not isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata)
        ]
    except Exception as error:  # the parts of a damaged metadata may have any type
        raise _damage(path, error) from error
    for file, offset, length, transforms in objects:
        if transforms:
            raise _refusal(file, f"an object behind {transforms}")
        if not file.is_file():
            continue  # the code that reads the tensors reports a missing file
        with file.open("rb") as stream:
            stream.seek(offset)
            _check_saved(file, io.BytesIO(stream.read(length)))


def _check_saved(path: Path, source: str | io.BytesIO) -> None:
    """Checks data of torch.save by reading it with torch.load's default `weights_only=True`.

    Args:
        path: path of the file, for messages.
        source: the same path, whose tensors then stay on disk; or the bytes of a part of the file.

    Raises:
        UserError: see `check_pickles`.
    """
    mmap = isinstance(source, str)
    try:
        torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damage raises errors of many kinds, and so do attempts to evade
        name = re.search(r"GLOBAL (\S+)|[Cc]lass (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and name:
            raise _refusal(path, name[1] or name[2]) from error
        raise _damage(path, error) from error


def _refusal(path: Path, name: str) -> UserError:
    return UserError(
        f"{path} holds {name}, which no checkpoint of Megatron needs and which could run code: "
        "nothing of it was read; get the checkpoint from a source that you trust"
    )


def _damage(path: Path, error: Exception) -> DamagedError:
    reason = " ".join(str(error).split())[:100] or type(error).__name__
    return DamagedError(f"{path} is damaged ({reason}): copy the checkpoint again")
