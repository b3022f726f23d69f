"""File locks, which tell whether the process that writes a file is alive.

The kernel holds the locks: it releases a lock when the process ends, even after a kill.
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
    """Makes a file name beside `target` that is unique across threads, processes and machines."""
    return f"{target}.{kind}-{kernel_id()}-{secrets.token_hex(8)}"


@functools.cache
def kernel_id() -> str:
    """Identifies the running kernel.

    All processes of one kernel, in containers too, see each other's locks on every disk.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            name = file.read()
    except OSError:
        name = socket.gethostname()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


@contextmanager
def new_locked(target: str, make: Callable[[str], object]) -> Iterator[str]:
    """Makes a temporary file or directory beside `target` and holds its lock in the block."""
    descriptor = None
    while descriptor is None:  # another process may remove it as abandoned before it is locked
        name = beside(target)
        make(name)
        descriptor = lock(name)
    try:
        yield name
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: str, wait: bool = True) -> Iterator[None]:
    """Creates a lock file, holds its lock in the block, and removes it afterwards.

    Args:
        path: the lock file, which has no other purpose.
        wait: whether to wait for the process that holds the lock; see `lock`.

    Raises:
        OSError: the file cannot be created, or `wait` is False and it cannot be locked.
    """
    descriptor = None
    while descriptor is None:  # the process that held the lock has removed the file
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
    """Locks a file or directory.

    Args:
        path: the file or directory.
        wait: whether to wait for the process that holds the lock. If True, the function goes on
            without a lock on a disk that does not support locks.

    Returns:
        A file descriptor; closing it releases the lock. None if the file does not exist (any more).

    Raises:
        OSError: the file cannot be opened, or `wait` is False and it cannot be locked.
    """
    # Some network file systems lock only files that are open for writing. A directory cannot be.
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
    """Creates an empty file; raises `FileExistsError` if the file exists."""
    with open(path, "xb"):
        pass
