"""Attention inside the documents of a packed row; the loss is in test_normalization.py."""

import pytest
import torch

from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.attention import attention_mask, position_ids
from tests import ranks

EOD = 9
ROW = torch.tensor([[1, 2, EOD, 3, EOD, EOD, 4, 5]])
ISOLATED = MDMConfig(mdm_isolate_documents=True)


def test_positions_start_over_and_attention_stays_inside():
    assert position_ids(ROW, EOD, ISOLATED).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]
    hidden = attention_mask(ROW, torch.zeros_like(ROW).bool(), EOD, ISOLATED)
    inside = torch.block_diag(*(torch.ones(n, n) for n in (3, 2, 1, 2))).bool()
    assert torch.equal(~hidden[0, 0], inside)


def test_without_the_flag_a_row_is_one_document():
    assert position_ids(ROW, EOD, MDMConfig()).tolist() == [list(range(8))]
    assert attention_mask(ROW, torch.zeros_like(ROW).bool(), EOD, MDMConfig()) is None


def test_layouts_are_equal(base, tmp_path):
    """Middle stages need the documents too; with a shift their first tokens are not masked."""
    flags = [*base, "--mdm-isolate-documents", "--mdm-shift", "--train-iters", "2"]
    stages = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1".split()
    one = ranks.launch(tmp_path / "one", 1, *flags)
    two = ranks.launch(tmp_path / "two", 2, *flags, *stages)
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert two.grad_norms == pytest.approx(one.grad_norms, rel=1e-5)
    documents = [tokens for (split, _), (_, tokens) in one.masks().items() if split == 0]
    firsts = [row[i + 1] for row in documents for i in range(31) if row[i] == ranks.EOD_ID]
    assert len(firsts) > 5
    assert ranks.MASK_ID not in firsts
