"""Errors that a user can fix: one line that names the flag or file and says what to do.

This module also defines how a rank fails. torchrun gives each rank the path of an error file
(TORCHELASTIC_ERROR_FILE) and shows the message in that file in its report. The error files of a
node's ranks are RANK/error.json in one directory. A rank can therefore see whether another rank of
its node has failed before it.
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

BAD_INPUT = 2  # exit status of a process that a `UserError` ends
# Seconds that a rank waits for local rank 0 to print an error that both have found.
PATIENCE = 20.0
# torchrun reports the earliest failure as the cause. For a killed rank it records the time at which
# it noticed the death. By then other ranks may have failed because they lost their connection. Such
# ranks add these seconds to the time of their failure.
SECONDS_AFTER_THE_CAUSE = 2


def escaped(text: str, kept: str = "") -> str:
    r"""Makes a text safe to print: replaces non-printable characters by escapes (\n, \x1b).

    File names, keys and settings from elsewhere may contain line ends, which could forge another
    message, and escape sequences, which a terminal would execute.

    Args:
        text: the text to print.
        kept: characters that are not escaped.
    """
    return "".join(
        c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text
    )


class UserError(ValueError):
    """Bad input. The message is one line, names the flag, file or row, and says what to do."""

    def __init__(self, message: str) -> None:
        # PyTorch's DataLoader re-raises a worker's error with the traceback before the message.
        super().__init__(escaped(message.rpartition(f"{__name__}.UserError: ")[2].strip()))


class LostRankError(RuntimeError):
    """Another rank has ended, and its own output says why. The message is one line."""


class SharedError(UserError):
    """Bad input that every rank has found in the same way, after the ranks were connected."""


def exit_with(error: UserError) -> NoReturn:
    """Prints the one line of `error` to stderr and ends the process with status 2."""
    _report(str(error))
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(BAD_INPUT)


def exit_rank_with(error: UserError) -> NoReturn:
    """Ends this rank of a training run with the one line of `error` and status 2.

    Before the ranks are connected, every rank finds most errors itself. The first rank of each node
    prints the error, and the other ranks wait for the launcher to stop them. If nothing has stopped
    a rank after `PATIENCE` seconds, the first rank has not found the error, and this rank prints it
    with its own number. A `SharedError` is printed by the first rank of each node only, at any
    time. Every other error after the ranks are connected is printed at once, with the number of
    this rank.
    """
    state = sys.modules.get("megatron.core.parallel_state")
    is_connected = state is not None and state.is_initialized()
    is_shared = isinstance(error, SharedError)
    is_of_this_rank = is_connected and not is_shared
    is_first = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"
    if not is_of_this_rank and not is_first:
        # The launcher stops all ranks as soon as one ends. Local rank 0, which prints, must be it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE)
        if is_shared:
            sys.exit(BAD_INPUT)
        is_of_this_rank = True
    exit_with(UserError(_of_this_rank(str(error))) if is_of_this_rank else error)


def exit_rank_after(error: Exception) -> None:
    """Ends this rank of a training run with status 1 and one line, if another rank failed before.

    The traceback then goes only into the error file of this rank. If no other rank has failed, the
    function returns, and the caller lets Python print the traceback.

    Args:
        error: any exception but a `UserError`.
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
    """Whether another rank of this node has written its error file.

    Args:
        file: path of the error file of this rank, from torchrun; empty without torchrun.
    """
    own = Path(file)
    return bool(file) and any(path != own for path in own.parent.parent.glob(f"*/{own.name}"))


def _report(line: str, is_consequence: bool = False) -> None:
    """Writes the error file of this rank, which torchrun reads; outside torchrun does nothing.

    Args:
        line: the message.
        is_consequence: whether another rank's failure is the cause.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    seconds = int(time.time()) + SECONDS_AFTER_THE_CAUSE * is_consequence
    # torchrun's own key for a traceback (py_callstack) would make its report show the traceback
    # instead of the message.
    more = {"timestamp": str(seconds), "traceback": traceback.format_exc()}
    # The error is printed as well, so a failed write is ignored. torchrun crashes on a truncated
    # file, so the file gets its name only when it is complete.
    with suppress(OSError):
        with open(f"{file}.part", "w", encoding="utf-8") as report:
            json.dump({"message": {"message": line, "extraInfo": more}}, report)
        os.replace(f"{file}.part", file)


def run_tool(main: Callable[[], None]) -> None:
    """Runs the main function of a command-line tool; a `UserError` becomes one line and status 2.

    Ctrl-C ends the tool with status 130, as shells expect, and without a traceback.
    """
    try:
        main()
    except UserError as error:
        exit_with(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def check_numbers(args: argparse.Namespace, *names: str, least: int = 1) -> None:
    """Checks that numeric options are at least `least`; options that were not given pass.

    Args:
        args: the parsed options.
        names: attribute names of the options.
        least: the lowest value that is allowed.

    Raises:
        UserError: an option is below `least`.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: must be at least {least}")
