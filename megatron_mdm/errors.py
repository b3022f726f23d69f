"""Mistakes that a user can mend: one line that names the flag or file and says what to do.

Also how a rank fails. torchrun names a file to each rank (TORCHELASTIC_ERROR_FILE), and its report
shows the message that is there. The files of a node's ranks are RANK/error.json in one directory,
so that a rank sees whether another one has failed before it.
"""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

BAD_INPUT = 2  # the status of a process that a `UserError` ends
# Seconds that a rank waits for local rank 0 to print the mistake they share.
PATIENCE = 20.0
# torchrun takes the earliest failure for the cause of the others. It dates a rank that was killed
# by the time at which it has noticed, when other ranks may have lost their connection already.
SECONDS_AFTER_THE_CAUSE = 2


def escaped(text: str, kept: str = "") -> str:
    r"""A text that can be shown: what is not printable is written as in Python, \n or \x1b.

    File names, keys and settings that come from elsewhere may hold line ends, which would forge
    another message, and escape sequences, which a terminal would obey.

    Args:
        text: to be shown.
        kept: characters that stay as they are.
    """
    return "".join(
        c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text
    )


class UserError(ValueError):
    """Bad input. The message is one line, names the flag, file or row, and says what to do."""

    def __init__(self, message: str) -> None:
        # A loader's worker hands its error on with the traceback before the message.
        super().__init__(escaped(message.rpartition(f"{__name__}.UserError: ")[2].strip()))


class LostRankError(RuntimeError):
    """Another rank is gone, for which it has a reason of its own. The message is one line."""


class SharedError(UserError):
    """Bad input that all ranks have found alike, after they were connected."""


def exit_with(error: UserError) -> NoReturn:
    """Prints the one line of `error` to stderr and ends the process with status 2."""
    _report(str(error))
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(BAD_INPUT)


def exit_rank_with(error: UserError) -> NoReturn:
    """Ends one rank of a training run with the one line of `error` and status 2.

    Before the ranks are connected, all of them find most mistakes, and the first rank of each node
    prints them. It prints a `SharedError` too, at any time. Another rank prints a mistake that the
    first one has not found. The line then names this rank, as it does for every other mistake.
    """
    state = sys.modules.get("megatron.core.parallel_state")
    is_connected = state is not None and state.is_initialized()
    is_shared = isinstance(error, SharedError)
    is_of_this_rank = is_connected and not is_shared
    is_first = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"
    if not is_of_this_rank and not is_first:
        # A launcher stops all ranks when the first one ends: that has to be the one that prints.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE)
        if is_shared:
            sys.exit(BAD_INPUT)
        is_of_this_rank = True
    exit_with(UserError(_of_this_rank(str(error))) if is_of_this_rank else error)


def exit_rank_after(error: Exception) -> None:
    """Ends one rank of a training run with status 1 and a line, if another one has failed before.

    The traceback is then in the file of this rank alone. Otherwise this returns, and the caller
    lets Python print it.

    Args:
        error: any but a `UserError`.
    """
    if isinstance(error, LostRankError):
        line = str(error)
    else:
        first = (str(error).strip().splitlines() or [""])[0]
        line = f"{type(error).__name__}: {first}"
    line = escaped(_of_this_rank(line))
    is_consequence = isinstance(error, LostRankError) or another_rank_has_failed(
        os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    )
    _report(line, is_consequence)
    if is_consequence:
        print(line, file=sys.stderr, flush=True)
        sys.exit(1)


def _of_this_rank(line: str) -> str:
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return line
    return f"rank {os.environ.get('RANK', '0')}: {line}"


def another_rank_has_failed(file: str) -> bool:
    """Whether another rank of this node has written down why it fails.

    Args:
        file: that torchrun names to a rank; empty: none.
    """
    own = Path(file)
    return bool(file) and any(path != own for path in own.parent.parent.glob(f"*/{own.name}"))


def _report(line: str, is_consequence: bool = False) -> None:
    """Writes down for torchrun why this rank fails; outside torchrun it does nothing.

    Args:
        line: the message.
        is_consequence: of the failure of another rank.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    seconds = int(time.time()) + SECONDS_AFTER_THE_CAUSE * is_consequence
    # Under torchrun's own name for a traceback, its report would show that and not the message.
    more = {"timestamp": str(seconds), "traceback": traceback.format_exc()}
    # A copy of what is printed: where it cannot be written, the error is to be seen all the same.
    # torchrun fails at a file that is cut short.
    with suppress(OSError):
        with open(f"{file}.part", "w", encoding="utf-8") as report:
            json.dump({"message": {"message": line, "extraInfo": more}}, report)
        os.replace(f"{file}.part", file)


def run_tool(main: Callable[[], None]) -> None:
    """Runs the main function of a command-line tool; a `UserError` becomes one line and status 2.

    Ctrl-C ends with status 130, as shells expect, and without a traceback.
    """
    try:
        main()
    except UserError as error:
        exit_with(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def check_numbers(args: argparse.Namespace, *names: str, least: int = 1) -> None:
    """Checks options of those names, where they are given.

    Raises:
        UserError: one is below `least`.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: must be at least {least}")
