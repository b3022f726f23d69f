"""Attention that changes from causal to bidirectional: its masks, layouts and a resume."""

import pytest
import torch

from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.model.attention_mask import (
    annealed_future_positions,
    dense_attention_mask,
    opening_times_from_uniforms,
)
from megatron_mdm.objective.randomness import Split, row_uniforms
from tests import ranks

ANNEALING = MDMConfig(anneal_attention_iters=10)


def visible(progress):
    rows = [torch.from_numpy(row_uniforms(0, Split.TRAIN, row, 64)) for row in range(50)]
    uniforms = torch.stack(rows)
    ahead = annealed_future_positions(uniforms, progress)
    tokens = torch.zeros(50, 64, dtype=torch.int64)
    mask = dense_attention_mask(tokens, torch.zeros_like(tokens).bool(), 1, ANNEALING, None, ahead)
    return None if mask is None else ~mask[:, 0]


def test_it_starts_causal_and_ends_bidirectional():
    causal = torch.ones(64, 64).tril().bool()
    assert torch.equal(visible(0.0), causal.expand(50, 64, 64))
    assert visible(1.0) is None
    before = visible(0.0)
    for progress in (0.25, 0.5, 0.75):
        now = visible(progress)
        assert torch.all(now | ~before)  # an open position stays open
        assert torch.all(now[:, causal])
        assert float(now[:, ~causal].double().mean()) == pytest.approx(progress, abs=0.05)
        before = now


def test_a_run_that_began_annealing_keeps_its_opening_times():
    uniforms = torch.from_numpy(row_uniforms(0, Split.TRAIN, 0, 4))[None]
    times = torch.tensor([[36429, 641676, 383234, 195931]])
    assert torch.equal(opening_times_from_uniforms(uniforms), times)
    assert torch.equal(annealed_future_positions(uniforms, 0.25), times < 2**18)


def test_layouts_are_equal_and_a_resume_goes_on(base, tmp_path):
    data = base[: base.index("--load")]
    flags = "--mdm-anneal-attention-iters 4 --train-iters 6".split()
    one = ranks.launch(tmp_path / "one", 1, *base, *flags)
    plain = ranks.launch(tmp_path / "plain", 1, *base, "--train-iters", "6")
    assert one.losses[0] != plain.losses[0]
    checkpoint = ["--save", str(tmp_path / "checkpoint"), "--save-interval", "3"]
    pipeline = ["--pipeline-model-parallel-size", "2", *checkpoint]
    first = ranks.launch(tmp_path / "pp", 2, *base, *flags, *pipeline, "--exit-interval", "3")
    resume = [*data, *flags, *checkpoint, "--load", str(tmp_path / "checkpoint")]
    second = ranks.launch(tmp_path / "tp", 2, *resume, "--tensor-model-parallel-size", "2")
    assert [*first.losses, *second.losses] == pytest.approx(one.losses, rel=1e-5)
    assert [*first.grad_norms, *second.grad_norms] == pytest.approx(one.grad_norms, rel=1e-5)
