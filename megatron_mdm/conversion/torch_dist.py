"""Megatron's torch_dist checkpoints without a model: tensors written and read one at a time.

Megatron's own writer wants all tensors in memory and, on the CPU, calls CUDA. Here PyTorch's
distributed checkpointing writes the same files from a plan whose tensors are made when their turn
comes; reading asks for one slice at a time, whatever layout wrote the checkpoint.
"""

import io
import os
import pickle
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.dist_checkpointing.core import (
    CheckpointingConfig,
    CheckpointingException,
    save_config,
)
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_mdm.errors import UserError
from megatron_mdm.mcore.checkpoint.files import TRACKER, find_checkpoint
from megatron_mdm.mcore.checkpoint.integrity import check_sums, write_sums
from megatron_mdm.mcore.checkpoint.unpickling import check_pickles

COMMON_STATE = "common_state/shard_0_1"
WEIGHTS = ("embedding.", "decoder.", "output_layer.")

# What Megatron's saver records of how it laid out the keys, and goes by when it loads them.
CONTENT_METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class Place:
    """A tensor of the model in a checkpoint.

    Attributes:
        key: name in the checkpoint.
        index: on the first dimensions of the key: the layer, if all layers share it, and the
            expert, since those of a layer do.
        shape: without these dimensions.
    """

    key: str
    index: tuple[int, ...]
    shape: tuple[int, ...]


def locate(
    template: str, layer: int, shapes: dict[str, tuple[int, ...]], expert: int | None = None
) -> Place | None:
    """Where a tensor lies, None if nowhere: layers share a key if Megatron saw them all alike.

    Args:
        template: name of a tensor, with `{n}` for the layer if it belongs to one.
        layer: number of the layer.
        shapes: key -> shape of the checkpoint.
        expert: number of the expert, None if it belongs to none.
    """
    inner = () if expert is None else (expert,)
    candidates = [(template.format(n=layer), inner)]
    if "{n}" in template:
        candidates.append((template.replace("{n}.", ""), (layer, *inner)))
    for key, index in candidates:
        sizes = shapes.get(key, ())
        if len(sizes) > len(index) and all(i < n for i, n in zip(index, sizes, strict=False)):
            return Place(key, index, sizes[len(index) :])
    return None


@dataclass(frozen=True)
class Piece:
    """A tensor to be written.

    Attributes:
        place: where to.
        total: shape of the whole key.
        dtype: of the tensor.
        make: returns it, in the shape of the place.
    """

    place: Place
    total: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


class _Files(FileSystem):
    """Files that report a failed write between tensors.

    torch.save crashes the interpreter when a write fails under it: it cannot abandon its archive.
    """

    def __init__(self) -> None:
        super().__init__()
        self._error: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            yield _Stream(stream, self._patient)
            self.check()

    def _patient(self, call: Callable[..., Any], *args: Any) -> None:
        try:
            if self._error is None:
                call(*args)
        except OSError as error:
            self._error = OSError(error.errno, error.strerror)  # without the frames

    def check(self) -> None:
        """Raises the first `OSError` of a write, if there was one."""
        if self._error is not None:
            raise self._error


class _Stream:
    """A stream whose writes do not fail; see `_Files`."""

    def __init__(self, stream: Any, patient: Callable[..., None]) -> None:
        self._stream = stream
        self._patient = patient

    def write(self, data: Any) -> int:
        self._patient(self._stream.write, data)
        return len(data)

    def flush(self) -> None:
        self._patient(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _StreamingPlanner(DefaultSavePlanner):
    """Plans without tensors: each one is made when it is written."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        objects: dict[str, Any],
        progress: Callable[[int], object],
        files: "_Files",
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._objects = objects
        self._progress = progress
        self._files = files
        self._pieces: dict[MetadataIndex, Piece] = {}
        self._items = [
            WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in sorted(objects)
        ]
        for piece in pieces:
            item = _write_item(piece)
            self._pieces[item.index] = piece
            self._items.append(item)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([self._objects[write_item.index.fqn]], buffer)
            return buffer
        self._files.check()
        # The plan's index has been given a number on the way.
        piece = self._pieces[replace(write_item.index, index=None)]
        tensor = piece.make()
        assert tuple(tensor.shape) == piece.place.shape and tensor.dtype == piece.dtype, piece.place
        self._progress(tensor.nbytes)
        return tensor.view(_chunk(piece.place).sizes)


def _chunk(place: Place) -> ChunkStorageMetadata:
    """The part of its key that a tensor takes."""
    return ChunkStorageMetadata(
        torch.Size((*place.index, *[0] * len(place.shape))),
        torch.Size((*[1] * len(place.index), *place.shape)),
    )


def _write_item(piece: Piece) -> WriteItem:
    chunk = _chunk(piece.place)
    return WriteItem(
        MetadataIndex(piece.place.key, chunk.offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk,
            TensorProperties(piece.dtype),
            torch.Size(piece.total),
        ),
    )


def write(
    directory: Path,
    pieces: Sequence[Piece],
    objects: Sequence[str],
    args: Namespace,
    progress: Callable[[int], object],
) -> None:
    """Writes a checkpoint that Megatron loads as a release: weights, and nothing of a run.

    Args:
        directory: an existing one, as `--load` names it.
        pieces: the tensors.
        objects: keys of Megatron's extra states, which are empty.
        args: what the checkpoint says of the run that wrote it.
        progress: called with the bytes of each tensor.

    Raises:
        OSError: a file cannot be written.
    """
    common = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": CONTENT_METADATA,
    }
    release = directory / "release"
    release.mkdir()
    files = _Files()
    state = dict.fromkeys(objects) | {COMMON_STATE: common}
    planner = _StreamingPlanner(pieces, state, progress, files)
    # One thread: a tensor at a time.
    writer = dcp.FileSystemWriter(release, thread_count=1)
    writer.fs = files
    try:
        dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    except dcp.api.CheckpointException as error:
        # PyTorch wraps whatever went wrong, Ctrl-C included.
        raise next(iter(error.failures.values()))[0] from error
    save_config(CheckpointingConfig("torch_dist", 1), str(release))
    write_sums(release)
    (directory / TRACKER).write_text("release")


class DistCheckpoint:
    """The model's tensors in a Megatron checkpoint, whatever layout wrote it.

    Args:
        directory: as `--save` named it.
        iteration: which of its checkpoints; None for the last.
        hashes: compare its files with the sums that were saved with them.

    Raises:
        UserError: it is not a torch_dist checkpoint, or is damaged.
    """

    def __init__(self, directory: Path, iteration: int | None = None, hashes: bool = True) -> None:
        found = find_checkpoint(str(directory), iteration, step_flag="--iteration")
        if found is None:
            raise UserError(f"no checkpoint in {directory}: give the directory that --save named")
        self.name = str(found)
        self.path = found.path
        if hashes:
            check_sums(self.path)
        check_pickles(self.path)
        self._reader = dcp.FileSystemReader(self.path)
        try:
            metadata = self._reader.read_metadata()
        except OSError as error:
            raise UserError(
                f"{self.path} is not a whole torch_dist checkpoint: its .metadata cannot be read"
            ) from error
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        try:
            common = load_common_state_dict(str(self.path))
        except (CheckpointingException, dcp.api.CheckpointException, RuntimeError) as error:
            raise UserError(
                f"{self.path} is damaged: its arguments cannot be read; copy the checkpoint again"
            ) from error
        if common.get("args") is None:
            raise UserError(f"the checkpoint {self.path} has no arguments: save it with Megatron")
        self.args: Namespace = common["args"]
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: item
            for key, item in metadata.state_dict_metadata.items()
            if isinstance(item, TensorStorageMetadata) and key.startswith(WEIGHTS)
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape of the model's tensors."""
        return {key: tuple(item.size) for key, item in self._tensors.items()}

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self._tensors[key].properties.dtype

    def read(self, place: Place) -> torch.Tensor:
        """A tensor, in memory of its own.

        Raises:
            UserError: its file is damaged.
        """
        chunk = _chunk(place)
        tensor = torch.empty(chunk.sizes, dtype=self.dtype(place.key))
        items = create_read_items_for_chunk_list(place.key, self._tensors[place.key], [chunk])
        if sum(item.lengths.numel() for item in items) != tensor.numel():
            raise UserError(f"{self.path}: the tensor {place.key} is not whole")
        try:
            self._reader.read_data(LoadPlan(items), _Into(tensor)).wait()
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{self.path} is damaged: the tensor {place.key} cannot be read; copy the "
                "checkpoint again"
            ) from error
        return tensor.view(place.shape)


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        view = self._target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass
