"""The warm process that ranks and tools are forks of, in place of imports that take seconds."""

import multiprocessing
import os
import sys
from multiprocessing.context import BaseContext

# Told to audit hooks at each start, as subprocess.Popen is: see tests/tiers.py.
EVENT = "tests.ranks.start"

# torch and Megatron; the tokenizers with Hugging Face's libraries, which alone take more than a
# second; pytest, for entries in test files.
multiprocessing.set_forkserver_preload(["tests.ranks", "megatron.core.tokenizers.text", "pytest"])


def context(transformer_engine: bool = False) -> BaseContext:
    """What starts processes: as forks, or with Transformer Engine from nothing."""
    sys.audit(EVENT)
    # For tests/__init__.py, in the processes that this starts.
    os.environ["MDM_TEST_RANKS"] = "with Transformer Engine" if transformer_engine else "on the CPU"
    return multiprocessing.get_context("spawn" if transformer_engine else "forkserver")
