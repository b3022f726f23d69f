"""The binding to Megatron. README.md lists its parts in the order in which Megatron calls them."""

import multiprocessing
import os
import sys

from megatron_mdm.versions import check_megatron

# This package needs parts that old versions of Megatron lack, so every import of it checks the
# version: that of the program, of a tool, or of a script that uses the plugin.
_warning = check_megatron()
_is_first_rank = os.environ.get("RANK", "0") == "0"
# The processes that a rank spawns, such as the writer of checkpoints, import this package again.
if _warning and _is_first_rank and multiprocessing.parent_process() is None:
    print(_warning, file=sys.stderr, flush=True)
