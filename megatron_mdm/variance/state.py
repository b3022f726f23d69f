"""What a report of the variance has measured so far, in a file that another attempt reads."""

import dataclasses
import json
import os
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_mdm.errors import UserError
from megatron_mdm.files import complete_or_absent, write_errors

Row = dict[str, npt.NDArray[Any]]
SAVE_EVERY = 60.0  # seconds


class State:
    """Rows that were measured, kept in a file beside the report.

    Args:
        settings: a dataclass that says what is measured; a file of something else is refused.
        path: the file; None keeps nothing.
        writes: whether this process saves; one of several ranks does.

    Attributes:
        rows: for each row its arrays by name, of the same names and shapes for all.

    Raises:
        UserError: the file is damaged, or of another measurement.
    """

    def __init__(self, settings: Any, path: str | None = None, writes: bool = True):
        self.path = path
        self.writes = writes
        self.identity = json.dumps(dataclasses.asdict(settings))
        self.rows: list[Row] = []
        self._saved = time.monotonic()
        if path is not None and os.path.exists(path):
            self._load(path)

    def _load(self, path: str) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                columns = {name: file[name] for name in file}
            identity = str(columns.pop("identity"))
            rows = zip(*columns.values(), strict=True)
            self.rows = [dict(zip(columns, row, strict=True)) for row in rows]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is damaged: delete it to measure anew") from error
        if identity != self.identity:
            raise UserError(
                f"{path} is what was measured with other settings, another checkpoint or other "
                "data: delete it to measure anew, or give another --output"
            )

    def add(self, row: Row) -> None:
        """Takes a row, and saves if the last time is a while ago."""
        self.rows.append(row)
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Writes the file."""
        if not self.writes or self.path is None or not self.rows:
            return
        columns = {name: self.column(name) for name in self.rows[0]}
        with (
            complete_or_absent(self.path) as (temporary,),
            write_errors(self.path),
            open(temporary, "wb") as file,
        ):
            np.savez(file, allow_pickle=False, identity=np.array(self.identity), **columns)
        self._saved = time.monotonic()

    def column(self, name: str) -> npt.NDArray[Any]:
        """One of the arrays of all rows, the row first."""
        return np.stack([row[name] for row in self.rows])
