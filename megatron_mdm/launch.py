"""Starts a run like torchrun, with the same flags, and gives its ranks time to save when it ends.

    python -m megatron_mdm.launch --nproc-per-node 8 -m megatron_mdm.pretrain FLAGS

torchrun kills the ranks 30 s after it was told to stop, dies of SIGUSR1, ends with status 1
whatever the ranks' status was, and takes a run that was asked to stop for a failed one, which
--max-restarts starts again. This program hands the signals on, waits for as long as the ranks save,
starts none of them again, and ends with their status. SIGQUIT still ends all at once.

--max-restarts starts the ranks again when one has failed. torchrun would have them meet in a store
that still holds the addresses of those before (pytorch issue 135712), and no restart would work.

When a rank has failed, the last line is its error, in place of torchrun's report of all ranks. Bad
input is not tried again.
"""

import logging
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

import psutil

from megatron_mdm.errors import BAD_INPUT, another_rank_has_failed, escaped
from megatron_mdm.interruption import INTERRUPTED, SIGNALS, die_of

# Loggers of torchrun that tell of ranks that were stopped, and of the files of their errors.
REPORTERS = (
    "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.elastic.multiprocessing.errors.error_handler",
)


def main() -> None:
    """Runs torchrun in this process."""
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
    launcher = _Launcher()
    for number in SIGNALS:
        signal.signal(number, launcher.hand_on)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import api
    from torch.distributed.run import main as torchrun
    from torch.distributed.run import parse_args

    if "LOGLEVEL" not in os.environ:  # torchrun's own variable
        for name in REPORTERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    api.LocalElasticAgent = launcher.agent(api.LocalElasticAgent)  # type: ignore[misc]
    words = ["--signals-to-handle", "SIGHUP,SIGQUIT", *sys.argv[1:]]
    if parse_args(words).max_restarts:
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # a new one each time
    try:
        torchrun(words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode
        if status != INTERRUPTED and not launcher.has_shown(failure):
            launcher.say(f"error: {reason(rank, failure)}", failure)
        sys.exit(status if status > 0 else 128 - status)


def reason(rank: int, failure: Any) -> str:
    """Why a rank has failed, in one line.

    Args:
        rank: of all ranks.
        failure: torchrun's `ProcessFailure`.
    """
    message = failure.message
    if isinstance(message, dict):  # the rank has written it down
        return str(message["message"]).strip().partition("\n")[0]
    if failure.exitcode < 0:
        name = failure.signal_name()
        memory = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
        return f"rank {rank} (process {failure.pid}) was ended by {name}{memory}"
    return f"rank {rank} (process {failure.pid}) ended with status {failure.exitcode}"


class _Launcher:
    """The run of this launcher, and whether it was asked to stop."""

    def __init__(self) -> None:
        self._is_stopping = False
        self._logs: dict[int, str] = {}

    def has_shown(self, failure: Any) -> bool:
        """Whether the last line already is that of a rank of this node.

        Args:
            failure: torchrun's `ProcessFailure` of it.
        """
        is_told = failure.exitcode == BAD_INPUT and isinstance(failure.message, dict)
        if not is_told or self._logs.get(failure.local_rank):
            return False
        return not another_rank_has_failed(failure.error_file)

    def say(self, line: str, failure: Any) -> None:
        """Prints a line, and where the output of the rank is, if torchrun keeps it in a file.

        Args:
            line: why a rank of this node has failed.
            failure: torchrun's `ProcessFailure` of it.
        """
        log = self._logs.get(failure.local_rank)
        print(escaped(line + (f" (its output: {log})" if log else "")), file=sys.stderr, flush=True)

    def hand_on(self, number: int, _frame: FrameType | None) -> None:
        """A signal handler: sends the ranks the same signal."""
        self._is_stopping = True
        ranks = psutil.Process().children()
        if not ranks:
            die_of(number)
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    def agent(self, base: Any) -> Any:
        """A subclass of torchrun's agent of a node, which restarts no run that was stopped."""
        launcher = self

        class Agent(base):  # type: ignore[misc]  # known at run time only
            def _monitor_workers(self, worker_group: Any) -> Any:
                result = super()._monitor_workers(worker_group)
                launcher._logs = self._pcontext.stderrs
                # The signal may have come to another node: all ranks agree to stop.
                statuses = [failure.exitcode for failure in result.failures.values()]
                if launcher._is_stopping or {INTERRUPTED, BAD_INPUT} & set(statuses):
                    self._remaining_restarts = 0
                if result.is_failed() and self._remaining_restarts > 0:
                    rank, failure = min(result.failures.items(), key=lambda item: item[1].timestamp)
                    launcher.say(f"{reason(rank, failure)}; the ranks start again", failure)
                return result

        return Agent


if __name__ == "__main__":
    main()
