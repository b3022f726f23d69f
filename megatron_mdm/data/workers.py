"""Worker processes that keep the order, hold little memory, and whose death is noticed.

Neither `multiprocessing.Pool` nor `ProcessPoolExecutor` will do: the first waits for ever for a
worker that was killed, and so does the second if the worker was killed while it wrote a result
into the pipe that all of them share. Here every worker has a pipe of its own, which the kernel
closes when the worker dies.

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

# Results that wait for an earlier one, and tasks in progress, per worker.
_AHEAD = 4


class Workers:
    """Context manager: processes that each run `make_function(*arguments)` on tasks.

    They are started by `map` with the `spawn` method, hence free of the parent's threads and large
    libraries; a script that uses this needs the usual `if __name__ == "__main__"`. Leaving the
    block, by an exception too, kills them. Should the parent be killed they end by themselves.

    Args:
        count: How many processes at most.
        make_function: Called once in each process, with `arguments`; returns what maps a task to
            its result. Everything has to be picklable.
        arguments: See `make_function`.
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
        # Ctrl-C reaches the whole process group. Workers inherit the blocked signal, so that the
        # parent alone answers to it. Starting this helper of multiprocessing's, which the first
        # spawn would do, unblocks it again.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                # A daemon ends with the parent even if an interruption falls in between here.
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
        """Yields the results of `tasks` in their order; takes few tasks in advance. Once only.

        Raises:
            UserError: A worker died, or raised `UserError` itself.
            RuntimeError: A worker raised something else; the message holds its traceback.
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
            # A worker gets a task only when its last result has been taken: the two sides never
            # both wait for the other to read. What is wanted next is running or not yet sent, so
            # that the limit cannot stop everything.
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
    """Runs in a worker: answers tasks until the parent closes its end or is gone."""
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
