"""A lock that lets only one run at a time save into a directory."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from megatron_mdm.errors import UserError
from megatron_mdm.mcore.checkpoint.files import is_remote
from megatron_mdm.mcore.ranks import is_first_rank, notice

LOCK = ".run-lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
IN_USE = (errno.EACCES, errno.EAGAIN)  # either, by POSIX


@contextmanager
def only_writer(directory: str | None) -> Iterator[None]:
    """Context in which no other run saves into the directory. Only the first rank takes the lock.

    It is a POSIX record lock of the kernel, which is released however the process ends, and which
    network file systems support. The lock file names its holder.

    Args:
        directory: --save; created if it is missing. None: nothing is saved.

    Raises:
        UserError: another run holds the lock (the line names it), or the directory cannot be
            written.
    """
    if directory is None or is_remote(directory) or not is_first_rank():
        yield
        return
    is_new = not os.path.isdir(directory)
    path = os.path.join(directory, LOCK)
    descriptor = _lock(path, directory)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):  # without locks, a second run may have removed it
            os.unlink(path)
        os.close(descriptor)
        if is_new:
            with suppress(OSError):  # the directory is not empty: something was saved
                os.rmdir(directory)


def _lock(path: str, directory: str) -> int:
    """Takes the lock and returns its file descriptor; closing the descriptor releases the lock."""
    while True:
        try:
            os.makedirs(directory, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"--save {directory} cannot be written: {error.strerror}") from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise _refusal(error, descriptor, path, directory) from error
            notice(
                f"--save {directory} is on a file system without locks: a second run that saves "
                "there would not be noticed"
            )
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(descriptor)):
            break
        os.close(descriptor)  # the previous holder has just removed this file: try again
    job = os.environ.get("SLURM_JOB_ID")
    holder = f"host {socket.gethostname()}, process {os.getpid()}"
    holder += f", Slurm job {job}" if job else ""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{holder}, since {time.strftime('%F %T')}\n".encode(), 0)
    return descriptor


def _refusal(error: OSError, descriptor: int, path: str, directory: str) -> UserError:
    holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
    os.close(descriptor)
    if error.errno not in IN_USE:
        return UserError(f"{path} cannot be locked: {error.strerror}")
    return UserError(
        f"--save {directory} is in use by another run ({holder or 'unknown'}): wait for it or stop "
        f"it, or give another --save (if that run is gone, delete {path})"
    )
