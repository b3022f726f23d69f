"""Defaults of Megatron's fusions where the libraries that they need are missing."""

import sys

import pytest
import torch
from megatron.training.arguments import parse_args

from megatron_mdm.mcore.flags import arguments
from megatron_mdm.mcore.model import builder
from tests import ranks

TE, APEX = "transformer_engine", "fused_weight_gradient_mlp_cuda"


@pytest.mark.parametrize(
    "installed, fused",
    [
        ((), (False, False, False)),
        ((TE,), (True, True, False)),
        ((APEX, "scaled_masked_softmax_cuda"), (False, True, True)),
    ],
)
def test_defaults_follow_the_libraries(installed, fused, monkeypatch):
    """On CUDA, Megatron would stop or fail in the first step otherwise. A given flag wins."""

    def parsed(*flags):
        argv = [*ranks.MODEL, *ranks.TOKENIZER, *ranks.TRAINING, "--mdm-device", "cuda", *flags]
        monkeypatch.setattr(sys, "argv", ["pretrain", *argv])
        return parse_args(arguments.add_arguments)

    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: name if name in installed else None
    )
    names = ("apply_rope_fusion", "gradient_accumulation_fusion", "masked_softmax_fusion")
    assert tuple(getattr(parsed(), name) for name in names) == fused
    assert not parsed("--no-gradient-accumulation-fusion").gradient_accumulation_fusion


def test_layers_that_can_accumulate_in_their_products_do():
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    layers[1].fuse_wgrad_accumulation = False  # as in layers of Transformer Engine
    builder.accumulate_in_place(layers)
    assert layers[1].fuse_wgrad_accumulation
    assert not hasattr(layers[0], "fuse_wgrad_accumulation")
