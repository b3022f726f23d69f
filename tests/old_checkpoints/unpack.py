"""Checkpoints of this directory, as files."""

import tarfile
from pathlib import Path

HERE = Path(__file__).parent


def unpack(case: str, directory: Path) -> Path:
    """Puts the checkpoint of a case into a directory, as the run's --save was.

    Returns:
        The run's --save, with the checkpoint of iteration `cases.SAVED`.
    """
    with tarfile.open(HERE / f"{case}.tar.gz") as tar:
        tar.extractall(directory, filter="data")
    return directory / "checkpoint"
