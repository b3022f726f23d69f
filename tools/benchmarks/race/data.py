"""Training and held-out bytes of Python's standard library, split by file."""

import hashlib
import pathlib
import sysconfig

from benchmarks.python_text import MASK, write_documents
from megatron_mdm.errors import UserError

TOKENIZER = (
    "--tokenizer-type NullTokenizer --vocab-size 257 --null-tokenizer-eod-id 0 "
    f"--make-vocab-size-divisible-by 2 --mdm-mask-token-id {MASK}"
)
HELD_OUT = 16  # one of this many files is held out


def texts(held_out: bool) -> list[bytes]:
    """Returns the library's modules of one side of the split, in the order of their paths.

    The side of a module depends only on its path, so it is the same on every machine. Installed
    packages are left out.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    return [
        path.read_bytes()
        for name, path in sorted(paths.items())
        if not {"site-packages", "dist-packages"} & set(path.parts)
        and (_hash(name) % HELD_OUT == 0) is held_out
    ]


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def training_flags(directory: pathlib.Path, tokens: int) -> list[str]:
    """Returns the flags of the training data; see `write_training`.

    Raises:
        UserError: a run of this many tokens needs more than one epoch.
    """
    prefix = directory / "training"
    available = (directory / "training.bin").stat().st_size // 2  # tokens are uint16
    if tokens > available:
        raise UserError(
            f"a run takes {tokens} tokens, more than one epoch: this machine's standard library "
            f"has {available} for training"
        )
    return ["--train-data-path", str(prefix)]


def write_training(directory: pathlib.Path) -> None:
    """Writes the training modules as a Megatron dataset, with a document for each module."""
    write_documents(directory / "training", [text for text in texts(held_out=False) if text])


def held_out_flags(directory: pathlib.Path, length: int, rows: int) -> list[str]:
    """Writes the held-out rows that all runs of a length are measured on; returns their flags.

    The rows lie at equal distances in the held-out modules. Each row is a document, so that runs
    with different seeds use the same rows in different orders.

    Raises:
        UserError: there are too few held-out rows.
    """
    text = b"".join(texts(held_out=True))
    available = len(text) // length
    if available < rows:
        raise UserError(
            f"{rows} held-out rows of {length} tokens: this machine's standard library has "
            f"{available}"
        )
    places = [i * available // rows * length for i in range(rows)]
    prefix = directory / f"held_out_{length}"
    write_documents(prefix, [text[place : place + length] for place in places])
    return ["--valid-data-path", str(prefix)]
