"""The warm server process. Ranks and tools are forks of it, which saves seconds of imports."""

import multiprocessing
import os
import sys
from multiprocessing.context import BaseContext

# Event of `sys.audit` at each start, which tests/tiers.py hears as it hears subprocess.Popen.
EVENT = "tests.ranks.start"

# The server imports torch, Megatron, the tokenizers with Hugging Face's libraries (which alone take
# more than a second), and pytest, because entries may stand in test files.
multiprocessing.set_forkserver_preload(["tests.ranks", "megatron.core.tokenizers.text", "pytest"])


def context(transformer_engine: bool = False) -> BaseContext:
    """The context that starts processes: forks, or new processes for Transformer Engine."""
    sys.audit(EVENT)
    # tests/__init__.py reads this in the processes that this context starts.
    os.environ["MDM_TEST_RANKS"] = "with Transformer Engine" if transformer_engine else "on the CPU"
    return multiprocessing.get_context("spawn" if transformer_engine else "forkserver")
