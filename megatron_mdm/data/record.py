"""Records: small JSON files that say what a tool made its output from.

A record holds digests and settings, no times and no places, so that a copy of the output is worth
as much as the output. Whoever reads one checks that it is of the files beside it.

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

# To be raised when the same inputs and options begin to give another output.
FORMAT = 1
BLOCK, SAMPLE = 1 << 20, 4 << 10
_BEGIN = re.compile(rb'\{\s*"format": \d+,\s*"made_by": "')


@contextmanager
def read_errors(path: str | Path) -> Iterator[None]:
    """Turns an `OSError` of the block into a `UserError` about `path`, which it reads."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def record(tool: str, **content: Any) -> str:
    """The text of a record.

    Args:
        tool: That made the output.
        content: What there is to say, in JSON's types.
    """
    return json.dumps({"format": FORMAT, "made_by": tool, **content}, indent=2) + "\n"


def read_record(path: str, tool: str) -> dict[str, Any] | None:
    """Reads a record; None if there is no file, or one that this version of a tool did not write.

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
    except ValueError:  # no JSON, or no UTF-8
        return None
    ours = isinstance(content, dict) and content.get("made_by") == tool
    return content if ours and content.get("format") == FORMAT else None


def check_free(path: str, flag: str) -> None:
    """Checks that a record will not replace a file of another kind, such as an input.

    Args:
        path: Of the record.
        flag: That leads to this path, with its value.

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
            f"{flag}: {path} is where the record of the output goes, and is another file: give "
            "another name"
        )


def digest(value: Any) -> str:
    """A digest of a value in JSON's types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: str) -> str:
    """The sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def made_from(sources: Iterable[Path], options: dict[str, Any]) -> str:
    """A digest of files, and of the options of what is made from them.

    Of a file count its name, its size, and a part of its contents: the first MiB, and 4 KiB of each
    one after it. Training changes all weights, so that this tells models apart in a moment.

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
