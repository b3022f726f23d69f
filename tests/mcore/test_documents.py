"""Attention inside the documents of a packed row; the loss is in test_normalization.py."""

import torch

from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.attention import attention_mask, position_ids

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
