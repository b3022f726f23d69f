"""`python -m megatron_mdm.launch <torchrun's words>`: torchrun that gives its ranks time to save.

torchrun kills the ranks 30 s after it was told to stop, dies of SIGUSR1, and ends with status 1
whatever the ranks' was. This hands the signals on, waits for as long as the ranks save, and ends
with their status. SIGQUIT still ends all at once.
"""

import signal
import sys
from contextlib import suppress
from types import FrameType

import psutil

from megatron_mdm.interruption import INTERRUPTED, SIGNALS, die_of


def main() -> None:
    """Runs torchrun in this process."""
    for number in SIGNALS:
        signal.signal(number, _hand_on)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(["--signals-to-handle", "SIGHUP,SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        if status != INTERRUPTED:
            print(error, file=sys.stderr, flush=True)
        sys.exit(status if status > 0 else 128 - status)


def _hand_on(number: int, _frame: FrameType | None) -> None:
    ranks = psutil.Process().children()
    if not ranks:
        die_of(number)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


if __name__ == "__main__":
    main()
