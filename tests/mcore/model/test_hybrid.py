"""A HybridModel of attention and MLP layers equals GPTModel, under every layout."""

import pytest
import torch
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.model.hybrid import bidirectional_stack
from tests import ranks
from tests.ranks import entries

# Flags without Adam, because Megatron's translation of a checkpoint expects its state.
STEPS = "--no-load-optim --optimizer sgd --sgd-momentum 0 --weight-decay 0 --lr 0.1".split()
STEPS += "--train-iters 2".split()
METHODS = "--mdm-mask exact-count --mdm-views 2 --mdm-rate-sampler ppots --mdm-ppots-bins 4"
METHODS += " --mdm-ppots-refit-interval 1 --mdm-ppots-target gradient --eval-iters 1"
LAYOUTS = {
    "1 rank": (1, "--hybrid-layer-pattern *-*-*-*-"),
    "1 rank, full head": (1, "--hybrid-layer-pattern *-*-*-*- --mdm-head full"),
    "TP 2 + SP": (
        2,
        "--hybrid-layer-pattern *-*-*-*- --tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "PP 2 x VP 2": (2, "--hybrid-layer-pattern *-|*-|*-|*- --pipeline-model-parallel-size 2"),
}


@pytest.fixture(scope="module")
def gpt(base, tmp_path_factory):
    return ranks.launch(tmp_path_factory.mktemp("gpt"), 1, *base, *STEPS, *METHODS.split())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_patterns_train_as_gpt_model_from_its_checkpoint(layout, gpt, base, tmp_path):
    count, flags = LAYOUTS[layout]
    run = ranks.launch(tmp_path, count, *base, *STEPS, *METHODS.split(), *flags.split())
    assert run.masks().keys() == gpt.masks().keys()
    for name in ("mdm loss", "grad-norm", "mdm/validation NELBO", "mdm/density at t 0.05"):
        assert run.scalars[name] == pytest.approx(gpt.scalars[name], rel=1e-5), name


def test_documents_stay_apart_in_every_stage(base, tmp_path):
    flags = [*base, *STEPS, "--mdm-isolate-documents"]
    gpt = ranks.launch(tmp_path / "gpt", 1, *flags)
    count, layout = LAYOUTS["PP 2 x VP 2"]
    run = ranks.launch(tmp_path / "hybrid", count, *flags, *layout.split())
    assert run.losses == pytest.approx(gpt.losses, rel=1e-5)
    assert run.grad_norms == pytest.approx(gpt.grad_norms, rel=1e-5)


def test_tools_open_its_checkpoints(base, tmp_path):
    """A checkpoint saved from stages has, on one rank, the logits of the GPTModel it began as."""
    pattern = "--hybrid-layer-pattern *-|*-|*-|*- --pipeline-model-parallel-size 2".split()
    still = ["--no-load-optim", "--lr", "0", "--train-iters", "1", "--save-interval", "1"]
    save = ["--save", str(tmp_path / "checkpoint")]
    ranks.launch(tmp_path / "run", 2, *base, *pattern, *still, *save)

    def logits(name, checkpoint):
        ranks.launch(tmp_path / name, 1, "--", checkpoint, "1", entry=entries.logits)
        return torch.load(tmp_path / name / "logits0.pt")[0]

    gpt, hybrid = logits("gpt", base[base.index("--load") + 1]), logits("hybrid", save[1])
    for ours, reference in zip(hybrid, gpt, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_transformer_engines_layers_attend_in_both_directions():
    """Checks the spec only, because its layers cannot be built here. Megatron's stays causal."""
    config = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2)
    assert config.transformer_impl == "transformer_engine"

    def mask_type(spec):
        attention = spec.submodules.attention_layer.submodules.self_attention
        return attention.params["attn_mask_type"]

    assert mask_type(bidirectional_stack(config, MDMConfig())) == AttnMaskType.no_mask
    assert mask_type(hybrid_stack_spec) == AttnMaskType.causal
