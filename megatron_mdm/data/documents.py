r"""Reads documents from text and JSONL files, plain or gzipped.

There are two formats. A *text* file is one document, verbatim. In a *JSONL* file every line is a
JSON object that holds one document under a key; blank lines are skipped. Files are read as
streams, so that only one document at a time is in memory.

All tools determine the format of a file by the same rule. If `--format` is given, it decides.
Otherwise a file is JSONL if its name ends in one of `JSON_SUFFIXES` (with or without `.gz`), or if
its first line that is not blank is a JSON object. A file that holds a JSON array is refused. A byte
order mark at the start of a file is ignored. Lines end at \n or \r\n only.

Imports nothing beyond the standard library, because worker processes import this module.
"""

import argparse
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from megatron_mdm.errors import UserError

FORMATS = ("auto", "jsonl", "text")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_BOM = b"\xef\xbb\xbf"
# An array of objects, by its first two lines. A bracket alone is not enough: texts begin with it.
_ARRAY_OF_OBJECTS = re.compile(rb"\[\s*\{\s*([\"}]|\Z)")


class Document(NamedTuple):
    """One document, as bytes that are not parsed yet.

    `line` is its line number, from 1, in a JSONL file, and 0 for a text file. `position` is the
    number of bytes of all input files, as stored on disk, that were read up to its end.
    """

    path: str
    line: int
    data: bytes
    position: int


class BadDocumentError(UserError):
    """A document that cannot be read. The message is `FILE:LINE: REASON`."""


def resolve_inputs(inputs: Sequence[str], input_list: str | None = None) -> list[str]:
    """Returns the paths in `inputs`, then those in the file `input_list`, one per line.

    Raises:
        UserError: There are no paths, or a path is not a file.
    """
    paths = list(inputs)
    for path in paths:
        _check_file(path, "--input")
    if input_list is not None:
        _check_file(input_list, "--input-list")
        with open(input_list, "rb") as file:
            content = file.read().removeprefix(_BOM)
        for number, line in enumerate(split_lines(os.fsdecode(content)), 1):
            if line:
                _check_file(line, f"{input_list}:{number}")
                paths.append(line)
    if not paths:
        raise UserError("no input files: name some with --input or --input-list")
    return paths


def _check_file(path: str, origin: str) -> None:
    if os.path.isdir(path):
        raise UserError(
            f"{origin}: {path} is a directory; name its files, for instance with --input-list"
        )
    if not os.path.exists(path):
        raise UserError(f"{origin}: {path} does not exist")
    if not os.path.isfile(path):
        raise UserError(f"{origin}: {path} is not a regular file")


def add_format_argument(parser: argparse._ActionsContainer, files: str) -> None:
    """Adds --format to the command line of a tool.

    Args:
        parser: the tool's parser, or a group of it.
        files: the start of the help text, such as "format of the file of --data".
    """
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help=f"{files}: jsonl has one document per line, text one per file; auto takes jsonl for "
        f"{', '.join(JSON_SUFFIXES)} and for files whose first line is a JSON object, and text for "
        "all others (default: %(default)s)",
    )


def split_lines(text: str) -> list[str]:
    r"""Splits a text into lines without their ends, \n or \r\n.

    str.splitlines would also break lines at form feeds and other characters that do not end a line.
    """
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


class InputsDigest:
    """A digest of input files: of their contents in order, and of what their names imply.

    A file that is opened here is added to the digest while it is read. It has to be read to its end
    and without seeking.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def open(self, path: str) -> io.BufferedReader:
        """Opens a file that is part of the digest."""
        suffixes = path.endswith(".gz"), _has_json_name(path)
        self._hash.update(f"{suffixes} {os.path.getsize(path)}\n".encode())
        return io.BufferedReader(_DigestedFile(path, self._hash.update), 1 << 18)

    def read(self, paths: Iterable[str]) -> str:
        """Reads files only for their digest.

        Raises:
            UserError: A file cannot be read.
        """
        for path in paths:
            with _read_errors(path), self.open(path) as file:
                while file.read(1 << 20):
                    pass
        return self.hex()

    def hex(self) -> str:
        """Returns the digest so far, in hexadecimal digits."""
        return self._hash.hexdigest()


class _DigestedFile(io.FileIO):
    """A file that passes all bytes that are read to a function."""

    def __init__(self, path: str, update: Callable[[memoryview], object]) -> None:
        super().__init__(path)
        self._update = update

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        self._update(memoryview(buffer)[:count])
        return count

    def readall(self) -> bytes:
        data = super().readall()
        self._update(memoryview(data))
        return data


@contextmanager
def _read_errors(path: str) -> Iterator[None]:
    """Turns an error of reading the file `path` in the block into a `UserError`."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_documents(
    paths: Iterable[str], file_format: str = "auto", digest: InputsDigest | None = None
) -> Iterator[Document]:
    """Yields the documents of `paths` in order.

    Args:
        paths: Files; files whose names end in `.gz` are decompressed.
        file_format: `jsonl`, `text`, or `auto`: see the rule above.
        digest: Gets the contents of all files; complete when all documents are read.

    Raises:
        UserError: A file cannot be read, has the suffix `.gz` and is not a gzip file, or holds a
            JSON array.
    """
    start = 0
    for path in paths:
        with _read_errors(path), digest.open(path) if digest else open(path, "rb") as raw:
            stream: io.BufferedIOBase = raw
            if path.endswith(".gz"):
                stream = io.BufferedReader(gzip.GzipFile(fileobj=raw))
            begun, head = _begin(stream)
            if _is_jsonl(path, head, file_format):
                for number, line in enumerate(itertools.chain(begun, stream), 1):
                    if line and not line.isspace():
                        yield Document(path, number, line, start + raw.tell())
            else:
                data = b"".join([*begun, stream.read()])
                yield Document(path, 0, data, start + raw.tell())
            start += raw.tell()


def _begin(stream: io.BufferedIOBase) -> tuple[list[bytes], bytes]:
    """Reads the beginning of a file, without a byte order mark.

    Returns:
        All lines up to the second line that is not blank; and these lines without the blank ones.
    """
    begun = [stream.readline().removeprefix(_BOM)]
    head = [line for line in begun if line.strip()]
    while len(head) < 2 and (line := stream.readline()):
        begun.append(line)
        head += [line] if line.strip() else []
    return begun, b"".join(head)


def _is_jsonl(path: str, head: bytes, file_format: str) -> bool:
    """Whether a file is JSONL, by the rule above.

    Args:
        path: Path of the file.
        head: The first two lines of the file that are not blank.
        file_format: `jsonl`, `text` or `auto`.

    Raises:
        UserError: The file holds a JSON array.
    """
    if file_format == "text":
        return False
    content = head.lstrip()
    is_named = file_format == "jsonl" or _has_json_name(path)
    if content.startswith(b"[") if is_named else _ARRAY_OF_OBJECTS.match(content):
        raise UserError(
            f"{path} holds a JSON array, and JSONL is one object a line: write it so, for "
            "example with jq -c '.[]' (--format text reads the whole file as one text)"
        )
    if is_named or not content.startswith(b"{"):
        return is_named
    try:
        return isinstance(json.loads(content.split(b"\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def _has_json_name(path: str) -> bool:
    return path.lower().removesuffix(".gz").endswith(JSON_SUFFIXES)


def document_text(document: Document, json_key: str) -> str:
    """Returns the text of a document; it may be empty.

    Args:
        document: A document from `read_documents`.
        json_key: The key of the text in a JSONL line.

    Raises:
        BadDocumentError: The document is not UTF-8, not a JSON object, has no such key, its value
            is not a string, or the string has lone surrogates, which no tokenizer can encode.
    """
    if document.line == 0:
        return _decode(document, document.data)
    return string_value(document, document_object(document), json_key, "--json-key")


def document_object(document: Document) -> dict[str, Any]:
    """Returns the JSON object of a line.

    Raises:
        BadDocumentError: The document is a text file, not UTF-8, or not a JSON object.
    """
    data = document.data
    if document.line == 0:
        raise bad_document(document, "a text file where JSONL is needed (see --format)")
    # Without its line end: a JSON error at the end of the line would be reported for line 2.
    content = _decode(document, data.rstrip(b"\r\n"))
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        reason = f"bad JSON: {error.msg} (column {error.colno})"
        if content.strip() == "{":
            reason = "the object continues on the next line: write one object a line (jq -c . does)"
        raise bad_document(document, reason) from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise bad_document(document, f"bad JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_document(document, f"a JSON {json_type(value)} where an object is needed")
    return value


def string_value(document: Document, value: dict[str, Any], key: str, flag: str) -> str:
    """Returns the string under `key`; the command line sets the key with `flag`.

    Raises:
        BadDocumentError: There is no such key, its value is not a string, or the string has lone
            surrogates, which no tokenizer can encode.
    """
    if key not in value:
        by_content = flag == "--json-key" and not _has_json_name(document.path)
        or_text = ", or read the file as one text with --format text" if by_content else ""
        raise bad_document(document, f'no key "{key}" (see {flag}{or_text})')
    text = value[key]
    if not isinstance(text, str):
        raise bad_document(
            document, f'the value of "{key}" is a JSON {json_type(text)}, not a string'
        )
    check_surrogates(document, text)
    return text


def check_surrogates(document: Document, text: str) -> None:
    """Checks that a text from JSON has no lone surrogates, which no tokenizer can encode.

    Raises:
        BadDocumentError: The text has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(text[error.start]):04x}"
        raise bad_document(document, f"the text holds a lone surrogate ({surrogate})") from None


def _decode(document: Document, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: byte 0x{data[error.start]:02x} ({error.reason})"
        raise bad_document(document, reason, data.count(b"\n", 0, error.start)) from None


def bad_document(document: Document, reason: str, line: int = 0) -> BadDocumentError:
    """Makes the error about a document; `line` counts from 0 at the start of the document."""
    return BadDocumentError(f"{document.path}:{max(document.line, 1) + line}: {reason}")


def json_type(value: object) -> str:
    """Returns JSON's name for the type of a value."""
    names = {list: "array", dict: "object", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
