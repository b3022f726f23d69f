import os

import pytest

# The fork server below inherits it: one thread a rank, since the ranks share the cores.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def environment():
    """What a test leaves there no later one inherits: Megatron's models say how they attend."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
