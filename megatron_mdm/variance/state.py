"""The measurements of a variance report, kept in a file so that it can be resumed."""

import dataclasses
import json
import os
import time
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from megatron_mdm.errors import UserError
from megatron_mdm.files import complete_or_absent, write_errors

Row = dict[str, npt.NDArray[Any]]
SAVE_EVERY = 60.0  # seconds


class State:
    """The measured rows, kept in a file beside the report.

    Args:
        settings: dataclass with the settings of the measurement; a file with other settings is
            rejected.
        path: the file; None: nothing is saved.
        writes: whether this process saves; only one of several ranks does.

    Attributes:
        rows: the arrays of each row by name; all rows have the same names and shapes.

    Raises:
        UserError: the file is damaged, or it was written with other settings.
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
        except (OSError, EOFError, BadZipFile, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged: delete it to measure anew") from error
        if identity != self.identity:
            raise UserError(
                f"{path} was measured with other settings, another checkpoint or other data: "
                "delete it to measure anew, or give another --output"
            )

    def add(self, row: Row) -> None:
        """Adds a row, and saves if the last save is more than `SAVE_EVERY` seconds ago."""
        self.rows.append(row)
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Writes all rows to the file."""
        if not self.writes or self.path is None or not self.rows:
            return
        columns: dict[str, Any] = {name: self.column(name) for name in self.rows[0]}
        with (
            complete_or_absent(self.path) as (temporary,),
            write_errors(self.path),
            open(temporary, "wb") as file,
        ):
            np.savez(file, identity=np.array(self.identity), **columns)
        self._saved = time.monotonic()

    def column(self, name: str) -> npt.NDArray[Any]:
        """Stacks the arrays of one name of all rows: [rows, ...]."""
        return np.stack([row[name] for row in self.rows])
