"""`python -m megatron_mdm.launch <torchrun's words>`: torchrun that gives its ranks time to save.

torchrun kills the ranks 30 s after it was told to stop, dies of SIGUSR1, ends with status 1
whatever the ranks' was, and takes a run that was asked to stop for a failed one, which
--max-restarts starts again. This hands the signals on, waits for as long as the ranks save, starts
none of them again, and ends with their status. SIGQUIT still ends all at once.

--max-restarts starts the ranks again when one has failed. torchrun would have them meet in a store
that still holds the addresses of those before (pytorch issue 135712), and no restart would work.
"""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

import psutil

from megatron_mdm.interruption import INTERRUPTED, SIGNALS, die_of


def main() -> None:
    """Runs torchrun in this process."""
    launcher = _Launcher()
    for number in SIGNALS:
        signal.signal(number, launcher.hand_on)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import api
    from torch.distributed.run import main as torchrun
    from torch.distributed.run import parse_args

    api.LocalElasticAgent = launcher.agent(api.LocalElasticAgent)  # type: ignore[misc]
    words = ["--signals-to-handle", "SIGHUP,SIGQUIT", *sys.argv[1:]]
    if parse_args(words).max_restarts:
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # a new one each time
    try:
        torchrun(words)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        if status != INTERRUPTED:
            print(error, file=sys.stderr, flush=True)
        sys.exit(status if status > 0 else 128 - status)


class _Launcher:
    """The run of this launcher, and whether it was asked to stop."""

    def __init__(self) -> None:
        self._is_stopping = False

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
                # The signal may have come to another node: all ranks agree to stop.
                statuses = [failure.exitcode for failure in result.failures.values()]
                if launcher._is_stopping or INTERRUPTED in statuses:
                    self._remaining_restarts = 0
                return result

        return Agent


if __name__ == "__main__":
    main()
