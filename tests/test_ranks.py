"""What ranks of the tests are like."""

from tests import ranks


def test_ranks_on_the_cpu_do_without_transformer_engine(tmp_path):
    """With it installed, Megatron would take its optimizer, which needs a GPU."""
    ranks.launch(tmp_path, 1, entry="libraries")
    assert (tmp_path / "hidden").read_text() == "True"
