"""--mdm-model hybrid describes the layers that the flags of GPTModel describe, or says why not."""

from argparse import Namespace

import pytest

from megatron_mdm.errors import UserError
from megatron_mdm.mcore.flags import arguments
from megatron_mdm.mcore.flags.architecture import check_model, differences
from tests.mcore.flags.parsing import parsed

PP = "--pipeline-model-parallel-size 2"
MOE = "--num-experts 4 --moe-layer-freq"


@pytest.mark.parametrize(
    "flags, world, pattern",
    [
        ("", 1, "*-*-*-*-"),
        ("--num-experts 4", 1, "*E*E*E*E"),
        (f"{MOE} 2", 1, "*E*-*E*-"),
        (f"{MOE} [0]+[1]*3", 1, "*-*E*E*E"),
        (PP, 2, "*-*-|*-*-"),
        (f"{PP} {MOE} [0,1,1,1]", 2, "*-*E|*E*E"),
        (f"{PP} --num-layers-per-virtual-pipeline-stage 1", 2, "*-|*-|*-|*-"),
        (f"{PP} --num-virtual-stages-per-pipeline-rank 2", 2, "*-|*-|*-|*-"),
        (f"{PP} --decoder-first-pipeline-num-layers 1", 2, "*-|*-*-*-"),
        (f"{PP} --decoder-last-pipeline-num-layers 1", 2, "*-*-*-|*-"),
        (f"{PP} --pipeline-model-parallel-layout Et|tt|t|L", 2, "*-|*-*-|*-|"),
        (
            f"{PP} --num-layers 6 --account-for-embedding-in-pipeline-split "
            "--account-for-loss-in-pipeline-split --num-layers-per-virtual-pipeline-stage 2",
            2,
            "*-|*-*-|*-*-|*-",
        ),
    ],
)
def test_the_layers_of_the_flags(flags, world, pattern, monkeypatch):
    args = parsed(monkeypatch, *flags.split(), "--mdm-model", "hybrid", world=world)
    assert args.hybrid_layer_pattern == pattern
    assert args.num_layers is None and args.pipeline_model_parallel_layout is None
    arguments.validate_flags(args)
    assert parsed(monkeypatch, *flags.split(), world=world).hybrid_layer_pattern is None


def test_flags_that_count_layers_count_those_of_hybrid_model(monkeypatch):
    """HybridModel has two layers for each of GPTModel's."""
    flags = "--recompute-granularity full --recompute-method block --recompute-num-layers 3".split()
    flags += ["--first-last-layers-bf16", "--num-layers-at-end-in-bf16", "2"]
    args = parsed(monkeypatch, *flags, "--mdm-model", "hybrid")
    assert args.recompute_num_layers == 6
    assert (args.num_layers_at_start_in_bf16, args.num_layers_at_end_in_bf16) == (2, 4)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            "--mdm-model hybrid --use-rope-scaling",
            "--use-rope-scaling does not reach HybridModel, because Megatron passes no RoPE "
            "scaling to it, which Llama 3.1 and later need: use --mdm-model gpt with --num-layers",
        ),
        ("--mdm-model hybrid --multi-latent-attention", "--multi-latent-attention does not reach"),
        ("--mdm-model hybrid --no-rope-freq 2", "--no-rope-freq does not reach HybridModel"),
        ("--mdm-model hybrid --rotary-interleaved", "--rotary-interleaved does not reach Hybrid"),
        (
            "--mdm-model hybrid --cpu-offloading-num-layers 1",
            "--cpu-offloading-num-layers does not reach HybridModel",
        ),
        ("--mdm-model hybrid --use-te-activation-func", "--use-te-activation-func does not reach"),
        (
            "--mdm-model hybrid --defer-embedding-wgrad-compute --mdm-head full",
            "--defer-embedding-wgrad-compute does not reach HybridModel",
        ),
        ("--mdm-model hybrid --num-layers 0", "--num-layers must be at least 1, got 0"),
        (f"--mdm-model hybrid {MOE} 0", "--moe-layer-freq must be at least 1, got 0"),
        (
            f"--mdm-model hybrid {PP} --num-layers-per-virtual-pipeline-stage 0",
            "--num-layers-per-virtual-pipeline-stage must be at least 1, got 0",
        ),
        (
            f"--mdm-model hybrid {PP} --num-virtual-stages-per-pipeline-rank 0",
            "--num-virtual-stages-per-pipeline-rank must be at least 1, got 0",
        ),
        (
            "--mdm-model hybrid --position-embedding-type relative",
            "--position-embedding-type relative does not reach HybridModel: use learned_absolute",
        ),
        (
            "--mdm-model hybrid --qk-layernorm --transformer-impl transformer_engine",
            "--qk-layernorm does not reach HybridModel's layers of Transformer Engine",
        ),
        (f"--mdm-model hybrid {MOE} [1,0]", "--moe-layer-freq has 2 entries for --num-layers 4"),
        (
            f"--mdm-model hybrid {PP} --num-layers-per-virtual-pipeline-stage 3",
            "--num-layers-per-virtual-pipeline-stage 3 x --pipeline-model-parallel-size 2 does not "
            "divide the 4 layers",
        ),
        (f"--mdm-model hybrid {PP} --num-layers 5", "Megatron rejects these flags"),
        (
            f"--mdm-model hybrid {PP} --decoder-first-pipeline-num-layers 1 "
            "--decoder-last-pipeline-num-layers 1",
            "Megatron rejects these flags",
        ),
        (
            f"--mdm-model hybrid {PP} --pipeline-model-parallel-layout Ett|tttL",
            "Megatron rejects these flags",
        ),
        (
            "--mdm-model gpt --hybrid-layer-pattern *-*-",
            "--hybrid-layer-pattern *-*- is of HybridModel: leave it out for --mdm-model gpt",
        ),
    ],
)
def test_layers_that_no_pattern_describes(flags, message, monkeypatch):
    with pytest.raises(UserError) as caught:
        arguments.validate_flags(parsed(monkeypatch, *flags.split(), world=2))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_number_of_layers_is_on_the_command_line(monkeypatch):
    """Megatron reads the checkpoint's number only after the pattern is made."""
    args = parsed(monkeypatch, "--mdm-model", "hybrid")
    args.hybrid_layer_pattern, args.use_checkpoint_args = None, True
    arguments.validate_flags(args)  # before Megatron reads the checkpoint, which may have a pattern
    args.num_layers = 4
    with pytest.raises(UserError, match="needs --num-layers on the command line, also with --use-"):
        arguments.validate_flags(args)


GPT = {"num_layers": 2, "num_experts": None, "moe_layer_freq": 1, "hybrid_layer_pattern": None}
EXPERTS = {**GPT, "num_experts": 4}


def hybrid(pattern, **more):
    return {**GPT, "num_layers": len(pattern), "hybrid_layer_pattern": pattern, **more}


@pytest.mark.parametrize(
    "saved, given, difference",
    [
        (GPT, hybrid("*-|*-"), ""),
        (EXPERTS, hybrid("*E*E", num_experts=4), ""),
        (hybrid("*-*-"), hybrid("*-|*-"), ""),
        (hybrid("*-*-"), GPT, "--mdm-model is hybrid in the checkpoint and gpt in the flags"),
        (
            hybrid("*-*-"),
            hybrid("*-*-*-"),
            "--hybrid-layer-pattern is *-*- in the checkpoint and *-*-*- in the flags",
        ),
    ],
)
def test_the_class_of_the_model_in_a_checkpoint(saved, given, difference):
    """Checkpoints that are older than --mdm-model are compared too."""
    assert differences(saved, given, "the flags") == difference


def test_layers_that_a_checkpoint_stores_one_by_one():
    saved = {**EXPERTS, "moe_layer_freq": [0, 1]}
    same = hybrid("*-*E", num_experts=4)
    assert differences(saved, same, "the flags") == ""
    with pytest.raises(UserError, match="stores each layer by itself, because of --moe-layer-freq"):
        check_model(Namespace(**same), saved, "there")
    check_model(Namespace(**same, ckpt_format="torch"), same, "there")


def test_a_format_in_which_no_model_moves():
    moved = Namespace(**hybrid("*-*-"), ckpt_format="torch")
    with pytest.raises(UserError, match="--ckpt-format torch into the same class only"):
        check_model(moved, GPT, "there")
    moved.ckpt_format = "torch_dist"
    check_model(moved, GPT, "there")
