"""Mistakes that a user can mend: one line that names the flag or file and says what to do."""

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """Bad input. The message is one line, names the flag, file or row, and says what to do."""


def exit_with(error: UserError) -> NoReturn:
    """Prints the one line of `error` to stderr and ends the process with status 2."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


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
