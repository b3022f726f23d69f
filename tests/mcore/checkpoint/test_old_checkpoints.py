"""An old checkpoint, when resumed, gives the losses that the version that saved it gave."""

import json
import os
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import load_common_state_dict

from megatron_mdm.checkpoint import open_checkpoint
from megatron_mdm.config import destinations
from megatron_mdm.mcore.argument_groups import Group, group
from megatron_mdm.mcore.flags.old_checkpoints import BEFORE, complete
from tests import ranks
from tests.old_checkpoints.cases import CASES, COMMON, SAVED, write_data
from tests.old_checkpoints.unpack import HERE, unpack
from tests.ranks import entries

EXPECTED = json.loads((HERE / "losses.json").read_text())


def old_logits() -> None:
    """Saves an old checkpoint's logits for the tokens of tests/old_checkpoints/make.py."""
    os.chdir(os.environ["TRACE_DIR"])
    with open_checkpoint("checkpoint", "cpu") as loaded:
        tokens = torch.tensor([[1, 2, 3, 50, 5, 50, 7, 49]])
        row = loaded.logits(tokens)[0, 3].tolist()
    Path("logits.json").write_text(json.dumps(row))


def in_its_directory() -> None:
    """Runs `entries.only_these_flags` in the run's directory, to which paths are relative."""
    os.chdir(os.environ["TRACE_DIR"])
    entries.only_these_flags()


@pytest.mark.parametrize("case", CASES)
def test_an_old_checkpoint_goes_on_as_it_would_have(case, tmp_path):
    unpack(case, tmp_path)
    write_data(tmp_path)
    run = ranks.launch(tmp_path, 1, "--", *COMMON, *CASES[case], entry=in_its_directory)
    scalars = ranks.read_scalars(tmp_path / "tensorboard")
    for name, values in EXPECTED[case].items():
        expected = [value for step, value in values if step > SAVED]
        assert scalars[name] == pytest.approx(expected, rel=1e-5), name
    assert "the checkpoint is older than some settings" in run.output[0]


def test_tools_open_an_old_checkpoint(tmp_path):
    """Logits are equal, also those of padding rows, which took part in the softmax then."""
    unpack("pretraining", tmp_path)
    ranks.launch(tmp_path, 1, entry=old_logits)
    found = json.loads((tmp_path / "logits.json").read_text())
    assert found == pytest.approx(EXPECTED["logits"], rel=1e-5)


def test_tools_measure_an_old_checkpoint_on_pairs(tmp_path):
    unpack("packed-pairs", tmp_path)
    write_data(tmp_path)
    measured = "--data pairs --rows 4 --rates 4 --masks 2 --batch 4 --bins 4 --output report.json"
    words = ["tools/variance_report.py", "--load", "checkpoint", "--device", "cpu"]
    ranks.launch(tmp_path, 1, "--", *words, *measured.split(), entry=entries.tool_in_its_directory)
    assert (tmp_path / "report.json").exists()


def test_every_newer_setting_has_a_value_for_old_checkpoints(tmp_path):
    directory = unpack("pretraining", tmp_path)
    saved = vars(load_common_state_dict(str(directory / f"iter_{SAVED:07d}"))["args"])
    settings = {name for name in destinations() if group(name) is not Group.RUN}
    assert settings - set(saved) == {*BEFORE, "mdm_model"}
    assert complete(saved)[0]["mdm_model"] == "gpt"
    assert os.path.getsize(HERE / "pretraining.tar.gz") < 200_000
