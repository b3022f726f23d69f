"""Training and held-out bytes of Python's standard library, which differ by file."""

import hashlib
import pathlib
import sysconfig

from benchmarks.python_text import MASK, write_documents
from megatron_mdm.errors import UserError

TOKENIZER = (
    "--tokenizer-type NullTokenizer --vocab-size 257 --null-tokenizer-eod-id 0 "
    f"--make-vocab-size-divisible-by 2 --mdm-mask-token-id {MASK}"
)
HELD_OUT = 16  # one file of so many is held out


def texts(held_out: bool) -> list[bytes]:
    """The library's modules, in the order of their paths, of one side of the split.

    A module's side follows from its path alone, so that it is the same on every machine that has
    it. Installed packages are no part of the library.
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
    """The training data as flags; see `write_training`.

    Raises:
        UserError: a run of so many tokens passes over the data more than once.
    """
    prefix = directory / "training"
    available = (directory / "training.bin").stat().st_size // 2  # of uint16
    if tokens > available:
        raise UserError(
            f"a run takes {tokens} tokens, more than one epoch: this machine's standard library "
            f"has {available} for training"
        )
    return ["--train-data-path", str(prefix)]


def write_training(directory: pathlib.Path) -> None:
    """Writes the modules to train on as a Megatron dataset, each as a document."""
    write_documents(directory / "training", [text for text in texts(held_out=False) if text])


def held_out_flags(directory: pathlib.Path, length: int, rows: int) -> list[str]:
    """Writes the rows that all runs of a length are measured on, and names them.

    They lie at equal distances in the held-out modules. Each is a document: a run of another seed
    takes the same rows in another order.

    Raises:
        UserError: there are fewer.
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
