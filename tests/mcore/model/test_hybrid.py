"""A HybridModel of attention and MLP layers equals GPTModel, in every layout and in the tools."""

import json
from pathlib import Path

import pytest
import torch
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.model.hybrid import bidirectional_stack
from tests import ranks
from tests.ranks import entries

STEPS = "--optimizer sgd --sgd-momentum 0 --weight-decay 0 --lr 0.1 --train-iters 2".split()
METHODS = "--mdm-mask exact-count --mdm-views 2 --mdm-rate-sampler ppots --mdm-ppots-bins 4"
METHODS += " --mdm-ppots-refit-interval 1 --mdm-ppots-target gradient --eval-iters 1"
DOCUMENTS = "--mdm-isolate-documents --mdm-rate-per document --mdm-random-length-fraction 0.3"
TP = "--tensor-model-parallel-size 2 --sequence-parallel"
PP = "--pipeline-model-parallel-size 2"
VP = f"{PP} --num-layers-per-virtual-pipeline-stage 1"
# Name -> number of ranks, flags of the model, flags of the method.
RUNS = {
    "1 rank": (1, "--mdm-model hybrid", METHODS),
    "full head": (1, "--mdm-model hybrid --mdm-head full", METHODS),
    "TP 2 + SP": (2, f"--mdm-model hybrid {TP}", METHODS),
    "PP 2 x VP 2": (2, f"--mdm-model hybrid {VP}", METHODS),
    "uneven stages": (2, f"--mdm-model hybrid {PP} --decoder-first-pipeline-num-layers 1", METHODS),
    "a pattern by hand": (2, f"--hybrid-layer-pattern *-*|-*-*- {PP}", METHODS),
    "documents, TP 2 + SP": (2, f"--mdm-model hybrid {TP}", DOCUMENTS),
    "documents, PP 2 x VP 2": (2, f"--mdm-model hybrid {VP}", DOCUMENTS),
}
GPT = {METHODS: "gpt", DOCUMENTS: "gpt, documents"}


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    layouts = {name: (1, "", methods) for methods, name in GPT.items()} | RUNS
    words = {
        name: (count, [*base, *STEPS, *model.split(), *methods.split()])
        for name, (count, model, methods) in layouts.items()
    }
    return ranks.launch_layouts(tmp_path_factory.mktemp("hybrid"), words)


@pytest.mark.parametrize("name", RUNS)
def test_it_trains_as_gpt_model_from_its_checkpoint(name, runs):
    run, gpt = runs[name], runs[GPT[RUNS[name][2]]]
    ranks.assert_masks_equal_after_refits(run.masks(), gpt.masks())
    compared = ["mdm loss", "grad-norm"]
    if RUNS[name][2] == METHODS:
        compared += ["mdm/validation NELBO", "mdm/density at t 0.05"]
    for scalar in compared:
        assert run.scalars[scalar] == pytest.approx(gpt.scalars[scalar], rel=1e-5), scalar
    assert gpt.grad_norms[1] != pytest.approx(gpt.grad_norms[0], rel=1e-3)


# -- tools

GENERATE = ["tools/generate.py", "--length", "9", "--steps", "6", "--block-length", "4"]
GENERATE += ["--temperature", "1", "--no-stop-at-eos", "--prompt", "50 51", "--suffix", "7 8"]
EVALUATE = ["tools/evaluate.py", "--rows", "8", "--draws", "2"]
FIT = "tools/fit_ppots.py --target gradient --rates 8 --rows 2 --masks 2 --family piecewise".split()


@pytest.fixture(scope="module")
def opened(base, data, tmp_path_factory):
    """Directories with what the tools say of a GPTModel, and of the same weights in a HybridModel.

    The HybridModel was saved from two pipeline stages. The tools find its class in the checkpoint.
    """
    directory = tmp_path_factory.mktemp("opened")
    still = ["--lr", "0", "--train-iters", "1", "--save-interval", "1", "--mdm-model", "hybrid"]
    hybrid = directory / "checkpoint"
    ranks.launch(directory / "run", 2, *base, *still, *PP.split(), "--save", str(hybrid))
    tools, texts = {}, {}
    for name, checkpoint in (("gpt", base[base.index("--load") + 1]), ("hybrid", str(hybrid))):
        texts[f"{name}, logits"] = ["--", checkpoint, "1"]
        load = ["--device", "cpu", "--load", checkpoint]
        output = str(directory / f"{name}.json")
        evaluated = ["--data", str(data), "--json", output]
        tools[f"{name}, generate"] = ["--", *GENERATE, *load]
        tools[f"{name}, evaluate"] = ["--", *EVALUATE, *load, *evaluated]
        tools[f"{name}, fit"] = ["--", *FIT, *load, "--output", str(directory / f"{name} fit.json")]
    ranks.launch_all(directory, 1, texts, entry=entries.logits)
    ranks.launch_all(directory, 1, tools, entry=entries.tool)
    return directory


def test_logits(opened):
    ours, reference = (
        torch.load(opened / f"{name}, logits" / "logits0.pt")[0] for name in ("hybrid", "gpt")
    )
    for x, y in zip(ours, reference, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_texts(opened):
    text, reference = (
        Path(opened, f"{name}, generate", "stdout0").read_text() for name in ("hybrid", "gpt")
    )
    assert text == reference and len(text.splitlines()[-1].split()) == 13


def test_the_likelihood_and_the_gradients_that_ppots_measures(opened):
    for file, names in ((".json", ["nelbo", "bins"]), (" fit.json", ["moments", "density"])):
        ours, reference = (
            json.loads((opened / f"{name}{file}").read_text()) for name in ("hybrid", "gpt")
        )
        for name in names:
            assert numbers(ours[name]) == pytest.approx(numbers(reference[name]), rel=1e-4), name


def numbers(value) -> list[float]:
    """All numbers in a JSON value, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [x for item in value for x in numbers(item)]
    return [value] if isinstance(value, int | float) else []


# -- Transformer Engine


def test_transformer_engines_layers_attend_in_both_directions():
    """Checks the spec only, because its layers cannot be built here. Megatron's stays causal."""
    config = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2)
    assert config.transformer_impl == "transformer_engine"

    def mask_type(spec):
        attention = spec.submodules.attention_layer.submodules.self_attention
        return attention.params["attn_mask_type"]

    assert mask_type(bidirectional_stack(config, MDMConfig())) == AttnMaskType.no_mask
    assert mask_type(hybrid_stack_spec) == AttnMaskType.causal
