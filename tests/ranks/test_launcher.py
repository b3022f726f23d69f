"""The processes that tests start as ranks: their libraries, their errors, their process groups."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel import layers
from torch import distributed

from tests import ranks


def libraries() -> None:
    """Saves whether the rank hides Transformer Engine, uses it, and disables torch.compile."""
    hidden = sys.modules.get("transformer_engine", "not hidden") is None
    found = {"hidden": hidden, "used": layers.HAVE_TE}
    found["compile disabled"] = os.environ.get("TORCH_COMPILE_DISABLE")
    Path(os.environ["TRACE_DIR"], "libraries.json").write_text(json.dumps(found))


def found_libraries(directory, **options):
    ranks.launch(directory, 1, entry=libraries, **options)
    return json.loads((directory / "libraries.json").read_text())


def test_ranks_on_the_cpu_do_without_transformer_engine(tmp_path):
    """If Transformer Engine is installed, Megatron would use its optimizer, which needs a GPU."""
    expected = {"hidden": True, "used": False, "compile disabled": "1"}
    assert found_libraries(tmp_path) == expected


def test_ranks_with_it_compile_as_users_do(tmp_path, monkeypatch):
    """Ranks with Transformer Engine use torch.compile, unless the user has disabled it."""
    monkeypatch.setenv("MDM_TEST_COMPILE_DISABLE", "")
    found = found_libraries(tmp_path, transformer_engine=True)
    assert (found["hidden"], found["compile disabled"]) == (False, None)
    assert os.environ["TORCH_COMPILE_DISABLE"] == "1"
    monkeypatch.setenv("MDM_TEST_COMPILE_DISABLE", "yes")
    assert ranks.users_environment()["TORCH_COMPILE_DISABLE"] == "yes"


def test_a_tool_that_fails_says_why(tmp_path):
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(AssertionError, match=f"error: .*{nowhere}"):
        ranks.run_tool("generate", "--device", "cpu", "--load", nowhere)


def three_groups() -> None:
    """Forms three process groups one after the other, and saves the sum over the ranks in each."""
    sums = []
    for number in range(3):
        if number:
            ranks.meet_again()
        distributed.init_process_group("gloo")
        total = torch.tensor(10 * number + distributed.get_rank())
        distributed.all_reduce(total)
        sums.append(int(total))
        distributed.destroy_process_group()
    Path(os.environ["TRACE_DIR"], f"sums{os.environ['RANK']}.json").write_text(json.dumps(sums))


def test_ranks_can_form_groups_one_after_the_other(tmp_path):
    ranks.launch(tmp_path, 2, entry=three_groups)
    for rank in range(2):
        assert json.loads((tmp_path / f"sums{rank}.json").read_text()) == [1, 21, 41]
