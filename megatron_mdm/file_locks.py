"""Locks of files, which say whether the process that works on one is alive.

They are the kernel's: a lock ends with its process, however that ends.
"""

import fcntl
import functools
import hashlib
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


def beside(target: str, kind: str = "tmp") -> str:
    """A name beside a target that no thread, process or other machine has."""
    return f"{target}.{kind}-{kernel_id()}-{secrets.token_hex(8)}"


@functools.cache
def kernel_id() -> str:
    """Names the running kernel, whose locks its processes see on every disk, in containers too."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            name = file.read()
    except OSError:
        name = socket.gethostname()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


@contextmanager
def new_locked(target: str, make: Callable[[str], object]) -> Iterator[str]:
    """Makes a temporary file or directory beside a target, and holds its lock in the block."""
    descriptor = None
    while descriptor is None:  # another process may take it for abandoned before it is locked
        name = beside(target)
        make(name)
        descriptor = lock(name)
    try:
        yield name
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: str, wait: bool = True) -> Iterator[None]:
    """Holds the lock of a file that is there for this alone.

    Args:
        path: of the file.
        wait: for whoever holds it; see `lock`.

    Raises:
        OSError: the file cannot be made, or `wait` is False and it cannot be locked.
    """
    descriptor = None
    while descriptor is None:  # the one that held it has removed it
        with suppress(FileExistsError):
            make_file(path)
        descriptor = lock(path, wait)
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(path)
        os.close(descriptor)


def lock(path: str, wait: bool = True) -> int | None:
    """Takes the lock of a file or directory; to be closed, which gives the lock up.

    Args:
        path: of it.
        wait: for the process that holds the lock; and do without it on a disk that has no locks.

    Returns:
        A file descriptor; None if there is no such file (any more).

    Raises:
        OSError: it cannot be opened, or `wait` is False and it cannot be locked.
    """
    # Some network file systems lock for writers only. Nobody can write to a directory.
    mode = os.O_RDONLY if os.path.isdir(path) else os.O_RDWR
    try:
        descriptor = os.open(path, mode)
    except FileNotFoundError:
        return None
    try:
        with suppress(*([OSError] if wait else [])):
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(descriptor)):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def make_file(path: str) -> None:
    """Makes an empty file; raises a `FileExistsError` if there is one."""
    with open(path, "xb"):
        pass
