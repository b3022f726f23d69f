"""Mistakes that a user can mend: one line that names the flag or file and says what to do."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

# Seconds that a rank waits for local rank 0 to print the mistake they share.
PATIENCE = 20.0


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
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


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
            sys.exit(2)
        is_of_this_rank = True
    if is_of_this_rank and os.environ.get("WORLD_SIZE", "1") != "1":
        error = UserError(f"rank {os.environ.get('RANK', '0')}: {error}")
    exit_with(error)


def exit_without_another(error: LostRankError) -> NoReturn:
    """Ends one rank with the one line of `error` and status 1.

    Without `error:`, which stands before the reason that the other rank has, if it could say one.
    """
    print(f"rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr, flush=True)
    sys.exit(1)


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
