"""Output files that are there complete or not at all.

An output is written under a temporary name beside it. A process that is killed leaves the temporary
file behind, and the next one that writes the same output removes it. A lock on the file says
whether its process is alive (file_locks.py).
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from megatron_mdm.errors import UserError
from megatron_mdm.file_locks import beside, kernel_id, lock, locked, make_file, new_locked

# Locks of other hosts are not seen on every shared disk, and earlier versions of this program took
# none. What they make is theirs until it has not changed for so many seconds.
_ABANDONED_AFTER = 24 * 3600.0


@contextmanager
def complete_or_absent(*targets: str) -> Iterator[list[str]]:
    """Yields temporary names beside `targets`, and renames them when the block has ended well.

    After an exception, Ctrl-C included, the temporary files are gone and files that `targets`
    named before are as they were. Several targets belong together: the last one, which is taken
    for the sign that the others are valid, is removed first and appears last, and an interruption
    in between leaves none of them. Of processes that write the same targets, one after the other
    renames all of its own. Directories that are missing are made. The temporary files are there,
    empty, when the block begins; those of processes that were killed are removed.

    Raises:
        UserError: A file cannot be put in its place.
    """
    directory = os.path.dirname(os.path.abspath(targets[0]))
    with write_errors(directory):
        os.makedirs(directory, exist_ok=True)
    temporary: list[str] = []
    with ExitStack() as locks:
        try:
            for target in targets:
                remove_abandoned(target)
                with write_errors(target):
                    temporary.append(locks.enter_context(new_locked(target, make_file)))
            yield temporary
            with write_errors(targets[0]):
                for name in temporary:
                    _flush_to_disk(name)
                if len(targets) == 1:
                    os.replace(temporary[0], targets[0])
                else:
                    _put_in_place(temporary, targets)
        except BaseException:
            _unlink(temporary)
            raise


def _put_in_place(temporary: Sequence[str], targets: Sequence[str]) -> None:
    """Renames files that belong together, while no other process does so; all of them or none."""
    # A file beside them, and not their directory: whoever makes that one may hold its lock.
    with locked(f"{targets[-1]}.tmp-lock"):
        try:
            with suppress(FileNotFoundError):
                os.unlink(targets[-1])
            for name, target in zip(temporary, targets, strict=True):
                os.replace(name, target)
        except BaseException:
            _unlink(targets)
            raise


@contextmanager
def new_directory(target: str) -> Iterator[str]:
    """Yields a temporary directory beside `target`, and renames it when the block has ended well.

    After an exception, Ctrl-C included, it is gone with all that was in it.

    Raises:
        UserError: `target` exists already, or cannot be made.
    """
    target = os.path.abspath(target)
    remove_abandoned(target)
    if os.path.lexists(target):
        raise UserError(f"{target} exists already: remove it, or give another directory")
    with write_errors(target), new_locked(target, os.makedirs) as temporary:
        try:
            yield temporary
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def set_aside(directory: str) -> Iterator[None]:
    """Renames a directory for the time of the block, in which another one may take its place.

    Afterwards it is removed. After an exception, Ctrl-C included, it is where it was, unless
    another one has taken its place: such a one is complete, and may be that of another process.
    After a kill, `remove_abandoned` does the same. A link to a directory is renamed and removed
    itself, and its directory stays. Nothing happens where there is no directory (any more).

    Raises:
        UserError: It cannot be renamed or removed.
    """
    directory = os.path.abspath(directory)
    old = beside(directory, "old")
    descriptor = None
    try:
        with write_errors(directory):
            while descriptor is None and os.path.exists(directory):
                descriptor = lock(directory)  # None if another process has exchanged it meanwhile
            if descriptor is not None:
                os.rename(directory, old)
        try:
            yield
        except BaseException:
            if descriptor is not None:
                with write_errors(directory):
                    _put_back(old, directory)
            raise
        if descriptor is not None:
            with write_errors(directory):
                _remove(old)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _put_back(old: str, directory: str) -> None:
    """Renames a directory that was set aside; removes it if another one has taken its place."""
    try:
        os.rename(old, directory)  # which fails if there is a directory that is not empty
    except OSError:
        if not os.path.lexists(directory):
            raise
        _remove(old)


def remove_abandoned(target: str) -> None:
    """Removes what processes that were killed have left beside an output.

    A directory that one of them had set aside comes back, unless another one has taken its place.
    Temporary files of processes that are alive stay. So do those of other hosts that have changed
    within a day, because not every shared disk shows locks of other hosts, and those that an
    earlier version of this program has named (`FILE.tmp-1234`), because it took no locks.
    """
    target = os.path.abspath(target)
    directory, base = os.path.split(target)
    form = re.compile(re.escape(base) + r"\.(tmp|old)-(?:(?:([0-9a-f]{8})-)?[0-9a-f]{16}|\d+)")
    with suppress(OSError):  # nothing there, or nobody's to remove
        for name in os.listdir(directory):
            if found := form.fullmatch(name):
                with suppress(OSError):
                    _remove_if_abandoned(os.path.join(directory, name), target, *found.groups())


def _remove_if_abandoned(path: str, target: str, kind: str, kernel: str | None) -> None:
    """Removes a temporary file or directory, or puts it back, if no process is at work on it.

    Args:
        path: of it.
        target: in whose place it was, or was to be.
        kind: "old" for what was set aside, or "tmp".
        kernel: that of the process that named it; None if an earlier version of this program did.
    """
    descriptor = lock(path, wait=False)  # which fails while its process is alive
    if descriptor is None:
        return
    try:
        if kernel != kernel_id() and time.time() - _last_change(path) < _ABANDONED_AFTER:
            return
        if kind == "old" and not os.path.lexists(target):
            os.rename(path, target)
        else:
            _remove(path)
    finally:
        os.close(descriptor)


def _remove(path: str) -> None:
    """Removes a file, a directory with all that is in it, or a link alone."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _unlink(paths: Iterable[str]) -> None:
    """Removes those of these files that can be removed."""
    for path in paths:
        with suppress(OSError):
            os.unlink(path)


def _last_change(path: str) -> float:
    """When a file, or anything in a directory, was last changed or renamed."""
    found = [path]
    for top, directories, files in os.walk(path):
        found += [os.path.join(top, name) for name in (*directories, *files)]
    return max(os.lstat(name).st_ctime for name in found)


def write_text(path: str, text: str) -> None:
    """Writes a small file, complete or not at all; raises a `UserError` if it cannot."""
    with (
        complete_or_absent(path) as (name,),
        write_errors(path),
        open(name, "w", encoding="utf-8") as file,
    ):
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


def check_output(path: str, flag: str) -> None:
    """Complains before anything is computed about a file that could not be written.

    Args:
        path: of the file; directories that are missing will be made.
        flag: that names it.

    Raises:
        UserError: There is a directory of this name, or no file can be made where it is to be.
    """
    if os.path.isdir(path):
        raise UserError(f"{flag} {path} is a directory: give the name of a file")
    place = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: no file can be made in {place}: give another place")


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
