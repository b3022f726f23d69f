"""The record of a conversion's sources: a conversion from the same sources is not repeated."""

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_mdm.conversion import safetensors_model
from megatron_mdm.conversion.torch_dist import DistCheckpoint
from megatron_mdm.data.record import read_record, record
from megatron_mdm.errors import UserError
from megatron_mdm.files import write_text
from megatron_mdm.hub_files import HUB_FILES
from megatron_mdm.mcore.checkpoint.tokenizer_lookup import tokenizer_of

TOOL = "tools/convert_checkpoint.py"
RECORD = ".conversion.json"  # a hidden file, so that it is not copied along with a model's files


def hugging_face_sources(directory: str) -> list[Path]:
    """Returns the files of a model directory that a conversion to Megatron depends on."""
    others = tuple(suffix for suffix in safetensors_model.WEIGHTS if suffix != ".safetensors")
    return [path for path in _files(Path(directory)) if not path.name.endswith(others)]


def megatron_sources(directory: str, iteration: int | None, hf_config: str | None) -> list[Path]:
    """Returns the files that a conversion to Hugging Face depends on.

    Args:
        directory: The checkpoint directory.
        iteration: Iteration of the checkpoint; None for the last.
        hf_config: Directory with config.json and tokenizer; None for the checkpoint's own.

    Raises:
        UserError: There is no checkpoint.
    """
    # The conversion compares the hashes.
    checkpoint = DistCheckpoint(Path(directory), iteration, hashes=False)
    found = sorted(path for path in checkpoint.path.iterdir() if path.is_file())
    tokenizer = tokenizer_of(directory, checkpoint.args)
    places = [hf_config, os.path.join(directory, HUB_FILES)]
    places += [tokenizer] if tokenizer not in places else []
    for place in [Path(place) for place in places if place is not None]:
        found += [place] if place.is_file() else _files(place)
    return found


def is_made_from(output: str, source: str) -> bool:
    """Whether a directory holds a complete conversion of these sources.

    Args:
        output: The directory of the conversion.
        source: Digest of the sources, from `made_from` (data/record.py).
    """
    found = read_record(os.path.join(output, RECORD), TOOL)
    return (
        found is not None
        and found.get("made_from") == source
        and found.get("files") == _sizes(output)
    )


def check_replaceable(output: str) -> None:
    """Checks that a directory holds only the files that this tool wrote.

    Raises:
        UserError: It holds other files, or files of other sizes.
    """
    found = read_record(os.path.join(output, RECORD), TOOL)
    if found is None or found.get("files") != _sizes(output):
        raise UserError(
            f"--replace: {output} is not as tools/convert_checkpoint.py wrote it: remove it, or "
            "give another directory"
        )


def write_record(output: str, source: str, command: Sequence[str]) -> None:
    """Writes the record into the directory of a conversion.

    Raises:
        UserError: The record cannot be written.
    """
    content = record(TOOL, made_from=source, files=_sizes(output), command=list(command))
    write_text(os.path.join(output, RECORD), content)


def _files(directory: Path) -> list[Path]:
    """Returns a model's files without hidden ones; none if the directory does not exist."""
    found = [*directory.glob("*"), *safetensors_model.chat_templates(directory)]
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def _sizes(directory: str) -> dict[str, int]:
    """Returns the size in bytes of every file below a directory, without the record."""
    paths = [path for path in sorted(Path(directory).rglob("*")) if path.is_file()]
    sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in paths}
    return {name: size for name, size in sizes.items() if name != RECORD}
