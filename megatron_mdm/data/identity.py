"""The identity of the data in a .bin/.idx pair, and the record of how they were made.

`tools/preprocess_data.py` writes a record, PREFIX.json, beside PREFIX.bin and PREFIX.idx. The
record is optional: pairs from Megatron's own tools have none. A record that does not match its
files, because they were replaced, is ignored.

Imports neither torch nor megatron.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any

from megatron_mdm.data.documents import InputsDigest
from megatron_mdm.data.encoding import TokenizerData
from megatron_mdm.data.fingerprint import fingerprint
from megatron_mdm.data.record import BLOCK, digest, file_digest, read_record, record
from megatron_mdm.errors import UserError

TOOL = "tools/preprocess_data.py"


@dataclasses.dataclass(frozen=True)
class Identity:
    """The identity of the data in a .bin/.idx pair, as plain values for checkpoints.

    Without a record, all attributes except `quick` are None.

    Attributes:
        quick: Digest of the sizes, of the whole .idx, and of the first, the middle and the last
            MiB of the .bin.
        full: Digest of every byte of both files, computed when they were written.
        kind: "text" or "pairs".
        tokenizer: `Fingerprint` of the tokenizer, as a dict.
        refused_mask: Id of the mask token, if texts that encode to it were refused.
        special_tokens: Whether text that spells a special token was encoded as that token.
        template_date: The date that a chat template wrote for today's date, None if it wrote none.
    """

    quick: str
    full: str | None = None
    kind: str | None = None
    tokenizer: dict[str, Any] | None = None
    refused_mask: int | None = None
    special_tokens: bool | None = None
    template_date: str | None = None


def data_identity(prefix: str) -> Identity:
    """Reads the identity of the pair PREFIX.bin, PREFIX.idx.

    Uses PREFIX.json only if its quick digest is that of the files; otherwise the files were
    replaced, and the record is ignored. Reads the whole .idx and at most 3 MiB of the .bin.

    Raises:
        UserError: A file is missing or cannot be read.
    """
    quick = quick_digest(f"{prefix}.bin", f"{prefix}.idx")
    found = read_record(f"{prefix}.json", TOOL)
    if found is None or found.get("quick") != quick:
        return Identity(quick)
    names = ("kind", "tokenizer", "refused_mask", "special_tokens", "template_date")
    return Identity(quick, digest(found.get("files")), **{name: found.get(name) for name in names})


def quick_digest(bin_path: str, idx_path: str) -> str:
    """Computes a digest of a pair without reading all of it; see `Identity.quick`.

    Raises:
        UserError: A file is missing or cannot be read.
    """
    result = hashlib.sha256()
    path = bin_path
    try:
        with open(bin_path, "rb") as tokens:
            size = os.fstat(tokens.fileno()).st_size
            path = idx_path
            with open(idx_path, "rb") as index:
                result.update(b"%d %d\n" % (size, os.fstat(index.fileno()).st_size))
                while block := index.read(BLOCK):
                    result.update(block)
            path = bin_path
            for start in (0, (size - BLOCK) // 2, size - BLOCK):
                tokens.seek(max(0, start))
                result.update(tokens.read(BLOCK))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return result.hexdigest()


def record_of(files: tuple[str, str], tokenizer: TokenizerData, **content: Any) -> str:
    """Makes the record of a .bin/.idx pair that was just written.

    Args:
        files: The .bin and the .idx; their names may be temporary.
        tokenizer: The tokenizer that encoded them.
        content: Further entries: `kind`, `special_tokens` and `template_date` as in `Identity`;
            `inputs`, the hexadecimal digest of an `InputsDigest`; `options`, see `is_made_from`;
            and any others, which only inform the reader.

    Raises:
        UserError: A file cannot be read.
    """
    return record(
        TOOL,
        files={
            name: {"bytes": os.path.getsize(path), "sha256": file_digest(path)}
            for name, path in zip(("bin", "idx"), files, strict=True)
        },
        quick=quick_digest(*files),
        tokenizer=dataclasses.asdict(fingerprint(tokenizer)),
        refused_mask=tokenizer.mask,
        **content,
    )


def is_made_from(prefix: str, inputs: Sequence[str], options: dict[str, Any]) -> bool:
    """Whether a .bin/.idx pair exists that was made from these files with these options.

    Args:
        prefix: Prefix of the pair.
        inputs: Input files; their contents are compared, not their names.
        options: Everything else that has an effect on the pair.

    Raises:
        UserError: A file cannot be read.
    """
    found = read_record(f"{prefix}.json", TOOL)
    if found is None or found.get("options") != options:
        return False
    if not all(os.path.isfile(f"{prefix}{suffix}") for suffix in (".bin", ".idx")):
        return False
    if found.get("quick") != quick_digest(f"{prefix}.bin", f"{prefix}.idx"):
        return False
    return found.get("inputs") == InputsDigest().read(inputs)
