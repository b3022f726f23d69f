"""Starts a run like torchrun, with the same flags, and gives its ranks time to save on a signal.

    python -m megatron_mdm.launch --nproc-per-node 8 -m megatron_mdm.pretrain FLAGS

torchrun alone kills the ranks 30 s after a signal to stop, and SIGUSR1 kills torchrun itself. It
ends with status 1, whatever the status of the ranks. It treats a run that was asked to stop as
failed, so that --max-restarts restarts it. This launcher forwards signals to the ranks, waits until
the ranks have saved, does not restart them, and ends with their status. SIGQUIT still ends
everything at once.

--max-restarts restarts the ranks after one has failed. With torchrun alone no restart works: the
new ranks meet in a store that still holds the addresses of the old ranks (pytorch issue 135712).
This launcher uses a new store for each start.

When a rank fails, the last line of output is the error of that rank, in place of torchrun's report
of all ranks. A run that ends because of bad input is not restarted.
"""

import logging
import os
import signal
import sys
from contextlib import nullcontext, suppress
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import psutil

from megatron_mdm.errors import BAD_INPUT, another_rank_has_failed, escaped
from megatron_mdm.interruption import INTERRUPTED, SIGNALS, die_of

# torchrun's loggers that report stopped ranks and the error files of ranks.
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
    args = parse_args(words)
    if args.max_restarts:
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # a new store each time
    # torchrun alone leaves a directory for each start, with no output in it unless it was asked to.
    has_output = args.log_dir or (args.redirects, args.tee) != ("0", "0")
    with nullcontext() if has_output else TemporaryDirectory(prefix="torchelastic_") as logs:
        try:
            torchrun(words if logs is None else ["--log-dir", logs, *words])
        except ChildFailedError as error:  # the error files of the ranks are in this directory
            rank, failure = error.get_first_failure()
            status = failure.exitcode
            if status != INTERRUPTED and not launcher.has_shown(failure):
                launcher.say(f"error: {reason(rank, failure)}", failure)
            sys.exit(status if status > 0 else 128 - status)


def reason(rank: int, failure: Any) -> str:
    """Says in one line why a rank has failed.

    Args:
        rank: global rank.
        failure: torchrun's `ProcessFailure` of this rank.
    """
    message = failure.message
    if isinstance(message, dict):  # the rank has written its error file
        return str(message["message"]).strip().partition("\n")[0]
    if failure.exitcode < 0:
        name = failure.signal_name()
        memory = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
        return f"rank {rank} (process {failure.pid}) was ended by {name}{memory}"
    return f"rank {rank} (process {failure.pid}) ended with status {failure.exitcode}"


class _Launcher:
    """State of this launcher: whether the run is to stop, and the output files of its ranks."""

    def __init__(self) -> None:
        self._is_stopping = False
        self._logs: dict[int, str] = {}

    def has_shown(self, failure: Any) -> bool:
        """Whether a rank of this node has already printed its error as the last line of output.

        Args:
            failure: torchrun's `ProcessFailure` of the rank.
        """
        is_told = failure.exitcode == BAD_INPUT and isinstance(failure.message, dict)
        if not is_told or self._logs.get(failure.local_rank):
            return False
        return not another_rank_has_failed(failure.error_file)

    def say(self, line: str, failure: Any) -> None:
        """Prints a line, with the path of the rank's output if torchrun writes it to a file.

        Args:
            line: why a rank of this node has failed.
            failure: torchrun's `ProcessFailure` of the rank.
        """
        log = self._logs.get(failure.local_rank)
        print(escaped(line + (f" (its output: {log})" if log else "")), file=sys.stderr, flush=True)

    def hand_on(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler that forwards the signal to all ranks."""
        self._is_stopping = True
        ranks = psutil.Process().children()
        if not ranks:
            die_of(number)
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    def agent(self, base: Any) -> Any:
        """Makes a subclass of torchrun's node agent that does not restart a stopped run."""
        launcher = self

        class Agent(base):  # type: ignore[misc]  # known at run time only
            def _monitor_workers(self, worker_group: Any) -> Any:
                result = super()._monitor_workers(worker_group)
                launcher._logs = self._pcontext.stderrs
                # Another node may have received the signal. All ranks then agree to stop, and the
                # local ranks end with the status INTERRUPTED.
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
