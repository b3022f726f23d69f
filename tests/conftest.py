import os

import pytest

# The fork server below inherits it: one thread a rank, since the ranks share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
# Megatron's models write here how they attend, fixtures' too, and refuse what others wrote.
ATTENTION = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


@pytest.fixture(autouse=True)
def environment():
    """What a test leaves in the environment no later one inherits."""
    before = {name: value for name, value in os.environ.items() if name not in ATTENTION}
    yield
    os.environ.clear()
    os.environ.update(before)
