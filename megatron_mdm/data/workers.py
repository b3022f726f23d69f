"""Worker processes: results in order, bounded memory, and an error if a worker dies.

`multiprocessing.Pool` waits for ever for a worker that was killed. So does `ProcessPoolExecutor`,
if the worker was killed while it wrote a result into the pipe that all workers share. Here every
worker has a pipe of its own, which the kernel closes when the worker dies.

Imports nothing beyond the standard library, because worker processes import this module.
"""

import itertools
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_mdm.errors import UserError

# Per worker: the limit of the tasks in progress plus the results that wait for an earlier one.
_AHEAD = 4


class Workers:
    """A context manager of processes that each apply `make_function(*arguments)` to tasks.

    `map` starts the processes with the `spawn` method, so that they do not inherit the parent's
    threads and large libraries. A script that uses this class needs the usual guard
    `if __name__ == "__main__"`. The end of the block kills the processes, also after an exception.
    If the parent is killed, they end by themselves.

    Args:
        count: Largest number of processes.
        make_function: Called once in each process, with `arguments`; returns a function that maps a
            task to its result. All of these have to be picklable.
        arguments: Arguments of `make_function`.
    """

    def __init__(
        self, count: int, make_function: Callable[..., Callable[[Any], Any]], *arguments: object
    ) -> None:
        self._count = count
        self._served = (make_function, arguments)
        self._processes: dict[Connection, multiprocessing.process.BaseProcess] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._kill()

    def _start(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        # Ctrl-C reaches the whole process group. Workers inherit the blocked signal, so that only
        # the parent handles it. Start multiprocessing's resource tracker first: the first spawn
        # would start it, and that would unblock the signal again.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                # A daemon ends with the parent even if an interrupt occurs before the next lines.
                process = context.Process(target=_serve, args=(theirs, *self._served), daemon=True)
                process.start()
                theirs.close()
                self._processes[ours] = process
        except OSError as error:
            raise UserError(
                f"cannot start {count} worker processes ({error.strerror}): use fewer --workers"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _kill(self) -> None:
        for process in self._processes.values():
            process.kill()
        for connection, process in self._processes.items():
            process.join()
            connection.close()
        self._processes.clear()

    def map(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """Yields the results of `tasks` in order; takes few tasks in advance. Call it only once.

        Raises:
            UserError: A worker died or raised a `UserError`.
            RuntimeError: A worker raised another exception; the message holds its traceback.
        """
        tasks = iter(tasks)
        first = list(itertools.islice(tasks, self._count))
        self._start(len(first))  # few tasks need few processes
        numbered = enumerate(itertools.chain(first, tasks))
        idle = list(self._processes)
        running: dict[Connection, int] = {}
        finished: dict[int, object] = {}
        wanted = 0
        while True:
            while wanted in finished:
                yield finished.pop(wanted)
                wanted += 1
            # A worker gets a task only after its last result has been received, so the two sides
            # never wait for each other to read. The next wanted task is running or not yet sent, so
            # the limit cannot cause a deadlock.
            while idle and len(running) + len(finished) < _AHEAD * self._count:
                number, task = next(numbered, (None, None))
                if number is None:
                    break
                self._send(idle[-1], task)
                running[idle.pop()] = number
            if not running:
                return
            for connection in running.keys() & wait(list(running)):
                finished[running.pop(connection)] = self._receive(connection)
                idle.append(connection)

    def _send(self, connection: Connection, task: object) -> None:
        try:
            connection.send(task)
        except OSError:
            raise self._death(connection) from None

    def _receive(self, connection: Connection) -> object:
        try:
            result, error = connection.recv()
        except (EOFError, OSError):
            raise self._death(connection) from None
        if error is not None:
            raise error
        return result

    def _death(self, connection: Connection) -> UserError:
        process = self._processes[connection]
        process.join(timeout=5)
        code = process.exitcode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with status {code}"
        return UserError(
            f"a worker process ended {how}; if memory ran out, use fewer --workers or less input"
        )


def _serve(
    connection: Connection,
    make_function: Callable[..., Callable[[Any], Any]],
    arguments: tuple[Any, ...],
) -> None:
    """The loop of a worker: answers tasks until the parent closes the connection or dies."""
    function = None
    answer: tuple[Any, Exception | None]
    try:
        while True:
            task = connection.recv()
            try:
                function = function or make_function(*arguments)
                answer = (function(task), None)
            except UserError as error:
                answer = (None, error)
            except Exception:
                answer = (None, RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))
            connection.send(answer)
    except (EOFError, OSError):
        pass
