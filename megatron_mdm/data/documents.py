"""Documents from text and JSONL files, plain or gzipped.

Two formats: in a *text* file the whole file is one document, verbatim; in a *JSONL* file every
line is a JSON object that holds one document under a key. Blank JSONL lines hold no document and
are passed over. Files are read as streams, so that only one document at a time is in memory.

Imports nothing beyond the standard library, because worker processes import this module.
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from megatron_mdm.errors import UserError

FORMATS = ("auto", "jsonl", "text")
_JSON_SUFFIXES = (".jsonl", ".json")
_BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """One document, as bytes that nobody has looked into yet.

    `line` is its line, from 1, in a JSONL file, or 0 where the file is the document. `position`
    counts the bytes of all input files, as they lie on disk, that were read up to its end.
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
        UserError: Nothing is named, or something that is named is not a file.
    """
    paths = list(inputs)
    for path in paths:
        _check_file(path, "--input")
    if input_list is not None:
        _check_file(input_list, "--input-list")
        with open(input_list, encoding="utf-8", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                if path := line.rstrip("\r\n"):
                    _check_file(path, f"{input_list}:{number}")
                    paths.append(path)
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


def read_documents(paths: Iterable[str], file_format: str = "auto") -> Iterator[Document]:
    """Yields the documents of `paths` in order.

    Args:
        paths: Files; those that end in `.gz` are decompressed on the way.
        file_format: `jsonl`, `text`, or `auto`, which takes `.jsonl` and `.json` (with or without
            `.gz`) for JSONL and everything else for text.

    Raises:
        UserError: A file cannot be read, or is not the gzip file that its name promises.
    """
    start = 0
    for path in paths:
        name = path.removesuffix(".gz")
        is_json = file_format == "jsonl" or (
            file_format == "auto" and name.endswith(_JSON_SUFFIXES)
        )
        try:
            with open(path, "rb") as raw:
                stream = raw if name == path else io.BufferedReader(gzip.GzipFile(fileobj=raw))
                if is_json:
                    for number, line in enumerate(stream, 1):
                        if not line.isspace():
                            yield Document(path, number, line, start + raw.tell())
                else:
                    yield Document(path, 0, stream.read(), start + raw.tell())
                start += raw.tell()
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path}: damaged gzip file ({error})") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def document_text(document: Document, json_key: str) -> str:
    """Returns the text of a document; it may be empty.

    Args:
        document: What `read_documents` yielded.
        json_key: Where a JSONL line holds its text.

    Raises:
        BadDocumentError: Not UTF-8, not a JSON object, no such key, not a string, or a string
            with lone surrogates, which no tokenizer can take.
    """
    if document.line == 0:
        return _decode(document, document.data)
    return string_value(document, document_object(document), json_key, "--json-key")


def document_object(document: Document) -> dict[str, Any]:
    """Returns the JSON object of a line.

    Raises:
        BadDocumentError: Not a line, not UTF-8, or not a JSON object.
    """
    data = document.data
    if document.line == 0:
        raise bad_document(document, "a text file where JSONL is needed (see --format)")
    if document.line == 1:
        data = data.removeprefix(_BOM)  # which JSON forbids and some editors write
    content = _decode(document, data.rstrip(b"\r\n"))  # or errors at the end are on line 2
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        raise bad_document(document, f"bad JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise bad_document(document, f"bad JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_document(document, f"a JSON {_json_type(value)} where an object is needed")
    return value


def string_value(document: Document, value: dict[str, Any], key: str, flag: str) -> str:
    """Returns the string under `key`, which the command line names with `flag`.

    Raises:
        BadDocumentError: No such key, not a string, or one with lone surrogates, which no
            tokenizer can take.
    """
    if key not in value:
        raise bad_document(document, f'no key "{key}" (see {flag})')
    text = value[key]
    if not isinstance(text, str):
        raise bad_document(
            document, f'the value of "{key}" is a JSON {_json_type(text)}, no string'
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(text[error.start]):04x}"
        raise bad_document(document, f"the text holds a lone surrogate ({surrogate})") from None
    return text


def _decode(document: Document, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: byte 0x{data[error.start]:02x} ({error.reason})"
        raise bad_document(document, reason, data.count(b"\n", 0, error.start)) from None


def bad_document(document: Document, reason: str, line: int = 0) -> BadDocumentError:
    """Makes the error; `line`, from 0, counts from the start of the document."""
    return BadDocumentError(f"{document.path}:{max(document.line, 1) + line}: {reason}")


def _json_type(value: object) -> str:
    names = {list: "array", dict: "object", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
