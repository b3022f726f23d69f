"""What a converted model was made from, so that a conversion is not repeated for nothing."""

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
RECORD = ".conversion.json"  # of a hidden name, so that it is not taken along as a model's file


def hugging_face_sources(directory: str) -> list[Path]:
    """The files of a model directory that a conversion to Megatron depends on."""
    others = tuple(suffix for suffix in safetensors_model.WEIGHTS if suffix != ".safetensors")
    return [path for path in _files(Path(directory)) if not path.name.endswith(others)]


def megatron_sources(directory: str, iteration: int | None, hf_config: str | None) -> list[Path]:
    """The files that a conversion to Hugging Face depends on.

    Args:
        directory: Of the checkpoint.
        iteration: Which checkpoint; None for the last.
        hf_config: Directory with config.json and tokenizer; None for the checkpoint's own.

    Raises:
        UserError: There is no checkpoint.
    """
    checkpoint = DistCheckpoint(Path(directory), iteration, hashes=False)  # which come later
    found = sorted(path for path in checkpoint.path.iterdir() if path.is_file())
    tokenizer = tokenizer_of(directory, checkpoint.args)
    places = [hf_config, os.path.join(directory, HUB_FILES)]
    places += [tokenizer] if tokenizer not in places else []
    for place in [Path(place) for place in places if place is not None]:
        found += [place] if place.is_file() else _files(place)
    return found


def is_made_from(output: str, source: str) -> bool:
    """Whether a conversion is there, all of it, that was made from this.

    Args:
        output: Its directory.
        source: What `made_from` (data/record.py) says of what it should be made from.
    """
    found = read_record(os.path.join(output, RECORD), TOOL)
    return (
        found is not None
        and found.get("made_from") == source
        and found.get("files") == _sizes(output)
    )


def check_replaceable(output: str) -> None:
    """Checks that a directory holds nothing but what this tool wrote.

    Raises:
        UserError: It does.
    """
    found = read_record(os.path.join(output, RECORD), TOOL)
    if found is None or found.get("files") != _sizes(output):
        raise UserError(
            f"--replace: {output} is not as tools/convert_checkpoint.py wrote it: remove it, or "
            "give another directory"
        )


def write_record(output: str, source: str, command: Sequence[str]) -> None:
    """Notes in the directory of a conversion what it was made from.

    Raises:
        UserError: The record cannot be written.
    """
    content = record(TOOL, made_from=source, files=_sizes(output), command=list(command))
    write_text(os.path.join(output, RECORD), content)


def _files(directory: Path) -> list[Path]:
    """A model's files that are not hidden; none if there is no such directory."""
    found = [*directory.glob("*"), *safetensors_model.chat_templates(directory)]
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def _sizes(directory: str) -> dict[str, int]:
    """Bytes of every file below a directory, the record left out."""
    paths = [path for path in sorted(Path(directory).rglob("*")) if path.is_file()]
    sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in paths}
    return {name: size for name, size in sizes.items() if name != RECORD}
