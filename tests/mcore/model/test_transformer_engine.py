"""Transformer Engine's spec: builds with bidirectional attention, and shares the local keys.

Nothing of Transformer Engine computes without a GPU, but its modules can be built where its
libraries load.
"""

from pathlib import Path

import pytest

from tests import HAS_TRANSFORMER_ENGINE, ranks

pytestmark = pytest.mark.skipif(
    not HAS_TRANSFORMER_ENGINE, reason="Transformer Engine is not installed (README, Install)"
)


def test_the_spec_builds_bidirectional_with_the_local_keys(tmp_path):
    ranks.launch(tmp_path, 1, entry="transformer_engine_spec", transformer_engine=True)
    assert (Path(tmp_path) / "built").read_text() == "done"
