"""Unpacks the checkpoints of this directory."""

import tarfile
from pathlib import Path

HERE = Path(__file__).parent


def unpack(case: str, directory: Path) -> Path:
    """Unpacks the checkpoint of a case into a directory.

    Returns:
        The run's --save directory, with the checkpoint of iteration `cases.SAVED`.
    """
    with tarfile.open(HERE / f"{case}.tar.gz") as tar:
        tar.extractall(directory, filter="data")
    return directory / "checkpoint"
