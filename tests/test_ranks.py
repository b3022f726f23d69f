"""What ranks of the tests are like."""

import json
import os

import pytest

from tests import ranks


def libraries(directory, **options):
    ranks.launch(directory, 1, entry="libraries", **options)
    return json.loads((directory / "libraries.json").read_text())


def test_ranks_on_the_cpu_do_without_transformer_engine(tmp_path):
    """With it installed, Megatron would take its optimizer, which needs a GPU."""
    expected = {"hidden": True, "used": False, "compile disabled": "1"}
    assert libraries(tmp_path) == expected


def test_ranks_with_it_compile_as_users_do(tmp_path, monkeypatch):
    """Unless torch.compile was switched off by who started the tests."""
    monkeypatch.setenv("MDM_TEST_COMPILE_DISABLE", "")
    found = libraries(tmp_path, transformer_engine=True)
    assert (found["hidden"], found["compile disabled"]) == (False, None)
    assert os.environ["TORCH_COMPILE_DISABLE"] == "1"
    monkeypatch.setenv("MDM_TEST_COMPILE_DISABLE", "yes")
    assert ranks.users_environment()["TORCH_COMPILE_DISABLE"] == "yes"


def test_a_tool_that_fails_says_why(tmp_path):
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(AssertionError, match=f"error: .*{nowhere}"):
        ranks.tool("generate", "--device", "cpu", "--load", nowhere)
