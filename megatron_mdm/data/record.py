"""Records: small JSON files with the inputs and options of a tool's output.

A record holds digests and settings, but no times and no paths, so that it is also valid for a copy
of the output. The reader of a record checks that it matches the files beside it.

Imports nothing beyond the standard library and `megatron_mdm.errors`.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_mdm.errors import UserError

# Version of the records. Raise it when the same inputs and options give another output.
FORMAT = 1
BLOCK, SAMPLE = 1 << 20, 4 << 10
_BEGIN = re.compile(rb'\{\s*"format": \d+,\s*"made_by": "')


@contextmanager
def read_errors(path: str | Path) -> Iterator[None]:
    """Turns an `OSError` in the block, which reads `path`, into a `UserError` about `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def record(tool: str, **content: Any) -> str:
    """Makes the text of a record.

    Args:
        tool: The tool that made the output.
        content: The entries, as JSON values.
    """
    return json.dumps({"format": FORMAT, "made_by": tool, **content}, indent=2) + "\n"


def read_record(path: str, tool: str) -> dict[str, Any] | None:
    """Reads a record; None if there is no file, or if another version or tool wrote it.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError:  # not JSON, or not UTF-8
        return None
    ours = isinstance(content, dict) and content.get("made_by") == tool
    return content if ours and content.get("format") == FORMAT else None


def check_free(path: str, flag: str) -> None:
    """Checks that a record will not replace a file that is not a record, such as an input.

    Args:
        path: Path of the record.
        flag: The flag, with its value, that determines this path.

    Raises:
        UserError: There is such a file.
    """
    if not os.path.lexists(path):
        return
    try:
        with open(path, "rb") as file:
            begin = file.read(BLOCK)
    except OSError:
        begin = b""
    if not _BEGIN.match(begin):
        raise UserError(
            f"{flag}: {path} is where the record of the output goes, and another file is there: "
            "give another name"
        )


def digest(value: Any) -> str:
    """Returns a digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: str) -> str:
    """Returns the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def made_from(sources: Iterable[Path], options: dict[str, Any]) -> str:
    """Returns a digest of input files and of the options of the conversion.

    The digest covers the name and size of each file and a part of its contents: the first MiB, and
    the first 4 KiB of each following MiB. This is fast, and it distinguishes models, since training
    changes all weights.

    Raises:
        UserError: A file cannot be read.
    """
    result = hashlib.sha256(digest(options).encode())
    for path in sources:
        with read_errors(path), open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            result.update(f"{path.name}\n{size}\n".encode("utf-8", "surrogateescape"))
            result.update(file.read(BLOCK))
            for start in range(BLOCK, size, BLOCK):
                file.seek(start)
                result.update(file.read(SAMPLE))
    return result.hexdigest()
