"""Reads and writes Megatron's torch_dist checkpoints, one tensor at a time and without a model.

Megatron's own writer needs all tensors in memory and calls CUDA, even on the CPU. Here PyTorch's
distributed checkpointing writes the same files from a plan that makes each tensor just before it is
written. The reader reads one slice at a time, under whatever parallel layout the checkpoint was
written.
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

# The norm after the last layer, in GPTModel's checkpoints and in HybridModel's.
GPT_NORM = "decoder.final_layernorm.weight"
HYBRID_NORM = "decoder.final_norm.weight"

# Megatron's saver records how it laid out the keys; its loader reads this record.
CONTENT_METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class Place:
    """The position of a tensor of the model in a checkpoint.

    Attributes:
        key: name of the checkpoint's tensor that contains it.
        index: index into the first dimensions of the key's tensor: the layer, if all layers share
            the key, and the expert, since the experts of a layer share a key.
        shape: shape of the tensor, without these dimensions.
    """

    key: str
    index: tuple[int, ...]
    shape: tuple[int, ...]


def locate(
    template: str, layer: int, shapes: dict[str, tuple[int, ...]], expert: int | None = None
) -> Place | None:
    """Finds a tensor in a checkpoint; None if it is not there.

    In GPTModel's checkpoints layers of the same kind share a key, with the layer as the first
    dimension. In HybridModel's, attention and MLP are layers of their own, each with its own keys.

    Args:
        template: name of a tensor, with `{n}` for the layer if it belongs to one.
        layer: number of the layer.
        shapes: key -> shape of the checkpoint's tensors.
        expert: number of the expert, None if the tensor belongs to none.
    """
    if HYBRID_NORM in shapes:
        layer = 2 * layer + (".self_attention." not in template)
        template = template.replace(GPT_NORM, HYBRID_NORM)
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
    """A tensor to write.

    Attributes:
        place: position of the tensor in the checkpoint.
        total: shape of the key's whole tensor.
        dtype: dtype of the tensor.
        make: returns the tensor, in the shape of the place.
    """

    place: Place
    total: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


class _Files(FileSystem):
    """A file system that reports a failed write only between tensors.

    A write that fails inside torch.save crashes the interpreter, since torch.save cannot abandon
    its archive.
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
            self._error = OSError(error.errno, error.strerror)  # a copy without the traceback

    def check(self) -> None:
        """Raises the first `OSError` that a write raised, if any."""
        if self._error is not None:
            raise self._error


class _Stream:
    """A stream whose writes do not raise; `_Files` keeps the error."""

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
    """A plan that makes each tensor when it is written."""

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
        # PyTorch has added a number to the plan's index.
        piece = self._pieces[replace(write_item.index, index=None)]
        tensor = piece.make()
        assert tuple(tensor.shape) == piece.place.shape and tensor.dtype == piece.dtype, piece.place
        self._progress(tensor.nbytes)
        return tensor.view(_chunk(piece.place).sizes)


def _chunk(place: Place) -> ChunkStorageMetadata:
    """Returns the part of its key's tensor that a tensor takes."""
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
    """Writes a checkpoint that Megatron loads as a release: weights without the state of a run.

    Args:
        directory: an existing directory, the value of `--load`.
        pieces: the tensors.
        objects: keys of Megatron's extra states, which are empty.
        args: the arguments that the checkpoint records.
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
    # One thread, so that one tensor at a time is in memory.
    writer = dcp.FileSystemWriter(release, thread_count=1)
    writer.fs = files
    try:
        dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    except dcp.api.CheckpointException as error:
        # PyTorch wraps every exception, KeyboardInterrupt included.
        raise next(iter(error.failures.values()))[0] from error
    save_config(CheckpointingConfig("torch_dist", 1), str(release))
    write_sums(release)
    (directory / TRACKER).write_text("release")


class DistCheckpoint:
    """Reads the model's tensors in a Megatron checkpoint, written under any parallel layout.

    Args:
        directory: the value of the run's `--save`.
        iteration: iteration of the checkpoint; None for the last.
        hashes: compare the files with the checksums that were saved with them.

    Raises:
        UserError: the directory has no torch_dist checkpoint, or the checkpoint is damaged.
    """

    def __init__(self, directory: Path, iteration: int | None = None, hashes: bool = True) -> None:
        found = find_checkpoint(str(directory), iteration, step_flag="--iteration")
        if found is None:
            raise UserError(f"no checkpoint in {directory}: give the directory that --save named")
        self.name = str(found)
        self.iteration = found.iteration
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
        """Maps the keys of the model's tensors to their shapes."""
        return {key: tuple(item.size) for key, item in self._tensors.items()}

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self._tensors[key].properties.dtype

    def read(self, place: Place) -> torch.Tensor:
        """Reads a tensor into new memory.

        Raises:
            UserError: the tensor's file is damaged.
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
    """Copies the data that is read into one tensor."""

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
