"""This process among those that a launcher started, before they are connected."""

import os
from typing import TextIO


def is_first_rank() -> bool:
    """Whether this is the first rank of all."""
    return os.environ.get("RANK", "0") == "0"


def is_first_of_node() -> bool:
    """Whether this is the first rank of its node."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def notice(text: str, file: TextIO | None = None) -> None:
    """Prints a line that tells a user what a run or a tool does, on the first rank alone.

    Args:
        text: the line.
        file: where to; None: stdout.
    """
    if is_first_rank():
        print(text, file=file, flush=True)
