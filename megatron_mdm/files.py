"""Output files that are either complete or absent.

An output is written to a temporary file in the same directory and then renamed. A killed process
leaves its temporary file behind. The next process that writes the same output removes this file. A
lock on the temporary file says whether its process is alive (file_locks.py).
"""

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
from megatron_mdm.libraries import MATPLOTLIB

# Not every shared disk shows the locks of other hosts, and earlier versions of this program took no
# locks. Their temporary files count as abandoned when they have not changed for these seconds.
_ABANDONED_AFTER = 24 * 3600.0


@contextmanager
def complete_or_absent(*targets: str) -> Iterator[list[str]]:
    """Yields names of temporary files beside `targets`; renames them when the block succeeds.

    When the block begins, the temporary files exist and are empty. Missing directories are created,
    and temporary files of killed processes are removed. After an exception, Ctrl-C included, the
    temporary files are removed and existing files at `targets` are unchanged.

    Several targets are replaced as one group. The last target marks the group as valid: it is
    removed first and appears last. An interruption during the renames leaves none of the targets.
    If several processes write the same targets, each process renames its whole group before the
    next one does.

    Raises:
        UserError: a file cannot be written or renamed.
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
    """Renames a group of files under a lock; leaves all of them at `targets`, or none."""
    # The lock is a file beside them. The process that creates their directory may hold its lock.
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
    """Yields a temporary directory beside `target`; renames it when the block succeeds.

    After an exception, Ctrl-C included, the directory and its contents are removed.

    Raises:
        UserError: `target` exists already, or cannot be created.
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
    """Moves a directory out of the way, so that the block can put a new one in its place.

    When the block succeeds, the old directory is removed. After an exception, Ctrl-C included, the
    old directory is put back, unless a new directory has its name: a new one is complete, and
    another process may have written it. After a kill, `remove_abandoned` does the same. If the
    name is a link, only the link is moved and removed. If the directory does not exist, nothing
    happens.

    Raises:
        UserError: the directory cannot be renamed or removed.
    """
    directory = os.path.abspath(directory)
    old = beside(directory, "old")
    descriptor = None
    try:
        with write_errors(directory):
            while descriptor is None and os.path.exists(directory):
                descriptor = lock(directory)  # None if another process has just replaced it
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
    """Puts a directory back that was set aside; removes it if a new one has its name."""
    try:
        os.rename(old, directory)  # fails if a directory of this name exists and is not empty
    except OSError:
        if not os.path.lexists(directory):
            raise
        _remove(old)


def remove_abandoned(target: str) -> None:
    """Removes the temporary files that killed processes have left beside an output.

    A directory that a killed process had set aside is put back, unless a new one has its name. The
    temporary files of living processes stay. Files of other hosts stay for a day after their last
    change, because not every shared disk shows the locks of other hosts. Files that an earlier
    version of this program named (`FILE.tmp-1234`) stay for a day too, because it took no locks.
    """
    target = os.path.abspath(target)
    directory, base = os.path.split(target)
    form = re.compile(re.escape(base) + r"\.(tmp|old)-(?:(?:([0-9a-f]{8})-)?[0-9a-f]{16}|\d+)")
    with suppress(OSError):  # the directory does not exist, or its files may not be removed
        for name in os.listdir(directory):
            if found := form.fullmatch(name):
                with suppress(OSError):
                    _remove_if_abandoned(os.path.join(directory, name), target, *found.groups())


def _remove_if_abandoned(path: str, target: str, kind: str, kernel: str | None) -> None:
    """Removes a temporary file or directory, or puts it back, if its process is dead.

    Args:
        path: the temporary file or directory.
        target: the output that it belongs to.
        kind: "old" for a directory that was set aside, or "tmp".
        kernel: `kernel_id` of the process that named it; None if an earlier version of this
            program named it.
    """
    descriptor = lock(path, wait=False)  # raises OSError while its process is alive
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
    """Removes a file, a directory with its contents, or a link without its destination."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _unlink(paths: Iterable[str]) -> None:
    """Removes files; skips files that cannot be removed."""
    for path in paths:
        with suppress(OSError):
            os.unlink(path)


def _last_change(path: str) -> float:
    """Time of the last change or rename of a file, or of anything in a directory; Unix seconds."""
    found = [path]
    for top, directories, files in os.walk(path):
        found += [os.path.join(top, name) for name in (*directories, *files)]
    return max(os.lstat(name).st_ctime for name in found)


def write_text(path: str, text: str) -> None:
    """Writes a small file, complete or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    with (
        complete_or_absent(path) as (name,),
        write_errors(path),
        open(name, "w", encoding="utf-8") as file,
    ):
        file.write(text)


def write_json(path: str, value: Any) -> None:
    """Writes a value as JSON, complete or not at all.

    Raises:
        UserError: the file cannot be written, or the value holds NaN or infinity, which JSON
            cannot represent.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError as error:
        raise UserError(
            f"cannot write {path}: a result is NaN or infinite, which JSON cannot represent"
        ) from error
    write_text(path, text + "\n")


def check_output(path: str, flag: str) -> None:
    """Checks, before anything is computed, that an output file can be written.

    Args:
        path: the output file; missing directories will be created later.
        flag: the flag that gave the path.

    Raises:
        UserError: the path is a directory, or no file can be created there.
    """
    if os.path.isdir(path):
        raise UserError(f"{flag} {path} is a directory: give the name of a file")
    place = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: cannot create a file in {place}: give another path")


def check_picture(path: str, flag: str, suffixes: tuple[str, ...] = (".png", ".svg")) -> None:
    """Checks, before anything is computed, that a picture can be drawn.

    Args:
        path: the picture's file.
        flag: the flag that gave the path.
        suffixes: suffixes that are allowed.

    Raises:
        UserError: the path has another suffix, or matplotlib is not installed.
    """
    if not path.lower().endswith(suffixes):
        raise UserError(f"{flag} {path}: must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    if not MATPLOTLIB.is_installed():
        raise UserError(f"{flag} {path} needs {MATPLOTLIB.name}: {MATPLOTLIB.install}")


def _flush_to_disk(path: str) -> None:
    """Forces a file's contents to disk before it is renamed; raises delayed write errors."""
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
    """Turns SIGTERM and SIGHUP into `SystemExit`, so that clean-up code in the block runs.

    Does nothing outside the main thread. Does not change signals that are ignored (`nohup`) or
    that already have a handler.
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
