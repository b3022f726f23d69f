"""Both normalizations are exact with unequal eligible tokens, under DP and accumulation."""

from pathlib import Path

import pytest
import torch

from tests import oracle, ranks

RATE = 1000.0  # so large that rounding of the weights does not hide the gradient
ONE_STEP = f"--optimizer sgd --sgd-momentum 0 --weight-decay 0 --clip-grad 0 --lr {RATE}".split()


# Checkpoints name a layer's norms as Transformer Engine's fused modules do.
NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def layer_of(name):
    """decoder.layers.2.x -> (decoder.layers.x, 2), because checkpoints stack the layers."""
    for module, key in NORMS.items():
        name = name.replace(module, key)
    parts = name.split(".")
    if parts[:2] != ["decoder", "layers"]:
        return name, None
    return ".".join(parts[:2] + parts[3:]), int(parts[2])


OBJECTIVES = {
    "tokens": "--no-mdm-eod-eligible",
    "rows": "--no-mdm-eod-eligible --mdm-normalization rows",
    "shift": "--no-mdm-eod-eligible --mdm-shift",
    "documents": "--no-mdm-eod-eligible --mdm-isolate-documents",
    "own rates": "--no-mdm-eod-eligible --mdm-isolate-documents --mdm-rate-per document",
    "own rates seen": "--no-mdm-eod-eligible --mdm-normalization rows --mdm-rate-per document",
    "blocks": "--no-mdm-eod-eligible --mdm-block-size 8",
    "blocks, rows": "--no-mdm-eod-eligible --mdm-block-size 8 --mdm-normalization rows --mdm-shift",
    "blocks of documents": "--no-mdm-eod-eligible --mdm-isolate-documents --mdm-block-size 3 "
    "--mdm-normalization rows --mdm-ar-loss-weight 0.5",
    "blocks, one rate": "--no-mdm-eod-eligible --mdm-isolate-documents --mdm-block-size 4 "
    "--mdm-rate-per document --mdm-shift --mdm-shift-first noisy",
    "blocks, random length": "--no-mdm-eod-eligible --mdm-random-length-fraction 0.7 "
    "--mdm-block-size 4 --mdm-shift --mdm-ar-loss-weight 2",
    "blocks, ISAD": "--no-mdm-eod-eligible --mdm-block-size 4 --mdm-isad-token-ids 5 60 70 119 "
    "--mdm-isad-delta 0.3 --mdm-rate-per row",
    "random length": "--no-mdm-eod-eligible --mdm-random-length-fraction 0.7",
    "random length, rows": "--no-mdm-eod-eligible --mdm-random-length-fraction 0.7 "
    "--mdm-normalization rows",
    "sft": "--mdm-sft --mdm-pad-eligible --mdm-normalization rows",
    "sft without padding": "--mdm-sft --mdm-confidence-loss 1",
    "sft shifted": "--mdm-sft --mdm-pad-eligible --mdm-normalization rows --mdm-shift "
    "--mdm-confidence-loss 2",
    "sft ISAD": "--mdm-sft --mdm-pad-eligible --mdm-isad-token-ids 5 60 70 119 "
    "--mdm-isad-delta 0.3",
    "sft blocks": "--mdm-sft --mdm-pad-eligible --mdm-block-size 4 --mdm-shift "
    "--mdm-normalization rows --mdm-confidence-loss 0.5",
    "sft blocks SyRM": "--mdm-sft --mdm-block-size 4 --mdm-syrm-token-ids 3 7 11 20 30 41",
    "packed sft blocks": "--mdm-sft --mdm-isolate-documents --mdm-block-size 4 "
    "--mdm-normalization rows --mdm-ar-loss-weight 0.5 --mdm-confidence-loss 1",
    "packed sft": "--mdm-sft --mdm-isolate-documents --mdm-rate-per document "
    "--mdm-normalization rows --mdm-confidence-loss 3",
    "packed sft padded": "--mdm-sft --mdm-isolate-documents --mdm-rate-per document --mdm-shift "
    "--mdm-normalization rows --mdm-pad-response-to-multiple-of 8",
}


@pytest.fixture(scope="module")
def runs(base, pairs, tmp_path_factory):
    """Objective -> the oracle's results, the step of two ranks, and its checkpoint directory."""
    directory = tmp_path_factory.mktemp("objectives")
    save = ["--save-interval", "1", "--train-iters", "1"]
    whole, parts = {}, {}
    for name, objective in OBJECTIVES.items():
        flags = [*base, *objective.split(), *ONE_STEP]
        flags += ["--data-path", str(pairs)] if "sft" in name else []
        whole[name] = [*flags, "--micro-batch-size", "8"]
        parts[name] = [*flags, *save, "--save", str(directory / "checkpoint" / name)]
    ranks.launch_all(directory / "whole", 1, whole, entry=oracle.whole_batch)
    steps = ranks.launch_all(directory / "parts", 2, parts)  # DP 2, two micro-batches each
    return {
        name: (
            torch.load(directory / "whole" / name / "whole_batch.pt"),
            steps[name],
            directory / "checkpoint" / name,
        )
        for name in OBJECTIVES
    }


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objective_of_the_whole_batch(name, runs, base):
    (loss, confidence, gradients), run, checkpoint = runs[name]
    assert run.losses[0] == pytest.approx(loss, rel=1e-5)
    if "--mdm-confidence-loss" in OBJECTIVES[name]:
        assert run.scalars["confidence loss"] == pytest.approx([confidence], rel=1e-5)
    else:
        assert "confidence loss" not in run.scalars

    before = ranks.weights(Path(base[base.index("--load") + 1]))
    after = ranks.weights(checkpoint)
    names = {layer_of(name)[0] for name in gradients}
    assert names == {n for n in after if "_extra_state" not in n}
    for name, gradient in gradients.items():
        key, layer = layer_of(name)
        step = (before[key] - after[key]) / RATE
        step = step if layer is None else step[layer]
        torch.testing.assert_close(step, gradient, rtol=1e-4, atol=1e-7, msg=name)
