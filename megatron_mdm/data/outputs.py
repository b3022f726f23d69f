"""Output files that are there complete or not at all."""

import importlib.util
import json
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from megatron_mdm.errors import UserError


@contextmanager
def complete_or_absent(*targets: str) -> Iterator[list[str]]:
    """Yields temporary names beside `targets`, and renames them when the block has ended well.

    After an exception, Ctrl-C included, the temporary files are gone and files that `targets`
    named before are as they were. Several targets belong together: the last one, which is taken
    for the sign that the others are valid, is removed first and appears last, and an interruption
    in between leaves none of them. Directories that are missing are made.

    Raises:
        UserError: A file cannot be put in its place.
    """
    temporary = [_beside(target) for target in targets]
    doomed = list(temporary)
    try:
        directory = os.path.dirname(os.path.abspath(targets[0]))
        with write_errors(directory):
            os.makedirs(directory, exist_ok=True)
        yield temporary
        with write_errors(targets[0]):
            for name in temporary:
                _flush_to_disk(name)
            if len(targets) > 1:
                doomed += targets
                with suppress(FileNotFoundError):
                    os.unlink(targets[-1])
            for name, target in zip(temporary, targets, strict=True):
                os.replace(name, target)
    except BaseException:
        for name in doomed:
            with suppress(OSError):
                os.unlink(name)
        raise


@contextmanager
def new_directory(target: str) -> Iterator[str]:
    """Yields a temporary directory beside `target`, and renames it when the block has ended well.

    After an exception, Ctrl-C included, it is gone with all that was in it.

    Raises:
        UserError: `target` exists already, or cannot be made.
    """
    target = os.path.abspath(target)
    if os.path.lexists(target):
        raise UserError(f"{target} exists already: remove it, or give another directory")
    temporary = _beside(target)
    with write_errors(target):
        os.makedirs(temporary)
    try:
        with write_errors(target):
            yield temporary
            os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def set_aside(directory: str) -> Iterator[None]:
    """Renames a directory for the time of the block, in which another one may take its place.

    Afterwards it is removed; after an exception, Ctrl-C included, it is where it was.

    Raises:
        UserError: It cannot be renamed.
    """
    old = _beside(os.path.abspath(directory), "old")
    with write_errors(directory):
        os.rename(directory, old)
    try:
        yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        os.rename(old, directory)
        raise
    shutil.rmtree(old)


def write_text(path: str, text: str) -> None:
    """Writes a small file, complete or not at all; raises a `UserError` if it cannot."""
    with complete_or_absent(path) as (name,), write_errors(path):
        with open(name, "w", encoding="utf-8") as file:
            file.write(text)


def write_json(path: str, value: Any) -> None:
    """Writes a value as JSON, complete or not at all.

    Raises:
        UserError: it cannot be written, or holds NaN or infinity, which JSON cannot say.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError as error:
        raise UserError(
            f"cannot write {path}: a result is NaN or infinite, which JSON cannot say"
        ) from error
    write_text(path, text + "\n")


def check_picture(path: str, flag: str, suffixes: tuple[str, ...] = (".png", ".svg")) -> None:
    """Complains before anything is computed about a picture that could not be drawn.

    Args:
        path: of the picture.
        flag: that names it.
        suffixes: what it may end in.

    Raises:
        UserError: another suffix, or no matplotlib.
    """
    if not path.lower().endswith(suffixes):
        raise UserError(f"{flag} {path}: must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{flag} {path} needs matplotlib: pip install 'megatron-mdm[plot]'")


def _beside(target: str, kind: str = "tmp") -> str:
    """A name beside a target that no thread, process or other machine has."""
    return f"{target}.{kind}-{secrets.token_hex(8)}"


def _flush_to_disk(path: str) -> None:
    """Makes the contents durable before the name is, and brings out write errors that wait."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def write_errors(path: str) -> Iterator[None]:
    """Turns an `OSError` of the block, such as a full disk, into a `UserError` about `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def termination_raises() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into `SystemExit`, so that the block's clean-up runs.

    Does nothing outside the main thread, and leaves alone signals that are ignored (`nohup`) or
    that have a handler already.
    """

    def raise_exit(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the clean-up
        raise SystemExit(128 + number)

    numbers = []
    if threading.current_thread() is threading.main_thread():
        candidates = (signal.SIGTERM, signal.SIGHUP)
        numbers = [n for n in candidates if signal.getsignal(n) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, raise_exit)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
