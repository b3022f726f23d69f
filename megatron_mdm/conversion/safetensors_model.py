"""Reads and writes Hugging Face model directories, one tensor at a time.

The safetensors format (github.com/huggingface/safetensors): 8 bytes with the length of the header,
the header in JSON with the dtype, shape and position of every tensor, then the tensors' bytes.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mdm.data.record import read_errors
from megatron_mdm.errors import UserError
from megatron_mdm.hub_files import CHAT_TEMPLATES

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Upper limit of the tensors' bytes in one file; the same as in transformers.
MAX_FILE_BYTES = 5 * 10**9
# Files of an adapter (such as LoRA), which changes the weights beside it.
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# Suffixes of weight files, which are not copied along with the tokenizer and the modeling code.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class Entry:
    """A tensor in a safetensors file.

    Attributes:
        path: path of the file.
        dtype: dtype of the tensor.
        shape: shape of the tensor.
        start: offset of the tensor's data in the file, in bytes.
        size: size of the tensor's data in bytes.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def read_object(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Raises:
        UserError: the file cannot be read, or does not hold a JSON object.
    """
    with read_errors(path):
        content = path.read_bytes()
    try:
        value = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object: download the model again")
    return value


def check_no_adapter(directory: Path) -> None:
    """Checks that there is no adapter beside a model.

    Raises:
        UserError: there is one; the message names its file.
    """
    for name in ADAPTER:
        if (directory / name).exists():
            raise UserError(
                f"{directory / name}: an adapter (LoRA) lies beside the model, and its weights "
                "would be left out: merge it into the model (peft's merge_and_unload) or move it"
            )


class HubModel:
    """The tensors of a Hugging Face model directory, read one at a time.

    The constructor reads the headers and checks that every file is there and complete.

    Attributes:
        entries: name -> position of the tensor in the files.
    """

    def __init__(self, directory: Path) -> None:
        self.entries: dict[str, Entry] = {}
        index = directory / INDEX
        weight_map: dict[str, str] = {}
        if index.exists():
            named = read_object(index).get("weight_map")
            if not isinstance(named, dict) or not all(map(_is_text, named.values())):
                raise UserError(f"{index} has no 'weight_map' of files: download the model again")
            weight_map = named
            missing = [name for name in set(weight_map.values()) if not (directory / name).exists()]
            if missing:
                raise UserError(
                    f"{directory}: {len(missing)} of the files that {INDEX} names are missing, "
                    f"such as {min(missing)}: download the model again"
                )
            files = sorted(set(weight_map.values()))
            if (directory / SINGLE).exists() and SINGLE not in files:
                raise UserError(
                    f"{directory} has {SINGLE}, which {INDEX} does not name: transformers would "
                    "load the former; remove the one that does not belong to the model"
                )
        else:
            files = sorted(path.name for path in directory.glob("*.safetensors"))
        if not files:
            raise UserError(
                f"{directory} has no *.safetensors files: give a directory with config.json and "
                "safetensors (other formats are not read)"
            )
        for file in files:
            for name, entry in read_header(directory / file).items():
                if weight_map.get(name, file) != file:
                    continue  # the index takes it from another file
                if name in self.entries:
                    other = self.entries[name].path.name
                    raise UserError(
                        f"{directory} has the tensor {name} twice, in {other} and {file}, and no "
                        f"{INDEX} that names one: remove the file that is not of this model"
                    )
                self.entries[name] = entry
        for name, file in weight_map.items():
            if name not in self.entries:
                raise UserError(f"{directory / file} lacks the tensor {name} that {INDEX} promises")

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor into new memory."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        with read_errors(entry.path), open(entry.path, "rb") as file:
            file.seek(entry.start)
            if file.readinto(_bytes(tensor)) != entry.size:
                raise UserError(f"{entry.path} ends before the tensor {name}: download it again")
        return tensor


def read_header(path: Path) -> dict[str, Entry]:
    """Reads the header of a safetensors file: name -> entry.

    Raises:
        UserError: the file cannot be read, is cut short, or has a tensor that is not of floats.
    """
    damaged = UserError(f"{path} is cut short or not a safetensors file: download it again")
    entries = {}
    try:
        with read_errors(path), open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if 8 + length > total:
                raise damaged
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, item in header.items():
            start, end = (8 + length + offset for offset in item["data_offsets"])
            dtype = DTYPES.get(item["dtype"])
            if dtype is None:
                raise UserError(
                    f"{path}: the tensor {name} has dtype {item['dtype']}: give weights in "
                    f"{', '.join(DTYPES)} (quantized ones are not converted)"
                )
            shape = tuple(item["shape"])
            size = torch.Size(shape).numel() * dtype.itemsize
            if end > total or end - start != size:
                raise damaged
            entries[name] = Entry(path, dtype, shape, start, size)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise damaged from error
    return entries


@dataclass(frozen=True)
class Output:
    """Tensors that one call makes.

    Attributes:
        names: names of the tensors.
        shapes: shapes of the tensors.
        dtype: dtype of all of them.
        make: returns the tensors.
    """

    names: Sequence[str]
    shapes: Sequence[tuple[int, ...]]
    dtype: torch.dtype
    make: Callable[[], list[torch.Tensor]]

    @property
    def bytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(torch.Size(shape).numel() for shape in self.shapes) * self.dtype.itemsize


def write_model(directory: Path, outputs: Sequence[Output]) -> Iterator[int]:
    """Writes safetensors files, with an index if there are several; holds one `Output` in memory.

    Yields:
        The bytes of the tensors that were written since the last yield.
    """
    files: list[list[Output]] = [[]]
    for output in outputs:
        if files[-1] and sum(o.bytes for o in files[-1]) + output.bytes > MAX_FILE_BYTES:
            files.append([])
        files[-1].append(output)
    weight_map: dict[str, str] = {}
    for number, members in enumerate(files, start=1):
        name = SINGLE
        if len(files) > 1:
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weight_map |= {tensor: name for output in members for tensor in output.names}
        yield from _write_file(directory / name, members)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(output.bytes for output in outputs)},
            "weight_map": weight_map,
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, outputs: Sequence[Output]) -> Iterator[int]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for output in outputs:
        for name, shape in zip(output.names, output.shapes, strict=True):
            size = torch.Size(shape).numel() * output.dtype.itemsize
            header[name] = {
                "dtype": NAMES[output.dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for output in outputs:
            for tensor, shape in zip(output.make(), output.shapes, strict=True):
                assert tensor.dtype == output.dtype and tuple(tensor.shape) == tuple(shape)
                file.write(_bytes(tensor.contiguous()))
            yield output.bytes
        file.flush()
        os.fsync(file.fileno())


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Returns a view of the memory of a contiguous tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def copy_side_files(source: Path, target: Path) -> None:
    """Copies the files beside the weights, except config.json, into another directory.

    Raises:
        UserError: a file cannot be read.
    """
    for path in side_files(source):
        with read_errors(path):
            file = open(path, "rb")  # noqa: SIM115  (only opening it is an error of reading)
        place = target / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        with file, open(place, "wb") as copy:
            shutil.copyfileobj(file, copy)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def chat_templates(directory: Path) -> list[Path]:
    """Returns the files of a tokenizer's chat templates, without the default one."""
    return sorted((directory / CHAT_TEMPLATES).glob("*.jinja"))


def side_files(directory: Path) -> list[Path]:
    """Returns the files beside the weights, except config.json: tokenizer, code, model card."""
    return [
        path
        for path in [*sorted(directory.iterdir()), *chat_templates(directory)]
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith((*WEIGHTS, ".index.json"))
        and path.name != "config.json"
    ]
