"""Lines that tell a user what a run or a tool does, before its ranks are connected."""

import os
from typing import TextIO


def notice(text: str, file: TextIO | None = None) -> None:
    """Prints a line on the first rank alone.

    Args:
        text: the line.
        file: where to; None: stdout.
    """
    if os.environ.get("RANK", "0") == "0":
        print(text, file=file, flush=True)
