"""What `--report` and `--figure` of several benchmarks share."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from megatron_mdm.errors import UserError
from megatron_mdm.files import check_output, check_picture


def check_drawing(report: object, figure: str | None) -> str:
    """Checks the two flags before anything is read, and returns the path of the picture.

    Args:
        report: the value of --report.
        figure: the value of --figure.

    Raises:
        UserError: one of them is missing, or a picture cannot be written there.
    """
    if not report or not figure:
        raise UserError("--report and --figure need each other: what to draw, and where to")
    check_picture(figure, "--figure")
    check_output(figure, "--figure")
    return figure


def read_results[T](path: str, benchmark: str, pick: Callable[[dict[str, Any]], T]) -> T:
    """Reads what --json of a benchmark wrote.

    Args:
        path: the file.
        benchmark: name of the benchmark, for the message.
        pick: takes what is needed from the document.

    Raises:
        UserError: the file cannot be read, or does not have what is needed.
    """
    try:
        return pick(json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path}: is not a result file of "benchmark.py {benchmark} --json" ({error!r})'
        ) from error
