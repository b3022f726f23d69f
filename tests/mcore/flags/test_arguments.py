"""Flags that cannot work end with one clear line; flags that can work are accepted."""

import re
import sys
from argparse import ArgumentParser
from dataclasses import fields

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend

from megatron_mdm.config import MDMConfig, destination, flag
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.flags import arguments, data_files
from tests.mcore.flags.parsing import FITTED, parsed

ONLINE = "--mdm-rate-sampler ppots --mdm-ppots-refit-interval 5"

BELL = "--mdm-rate-sampler logit-normal --mdm-logit-normal 0 0.5"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--mdm-eps 0", "--mdm-eps must lie in"),
        ("--mdm-eps 1", "--mdm-eps must lie in"),
        ("--mdm-eps nan", "--mdm-eps must lie in"),
        ("--mdm-mask-token-id -1", "--mdm-mask-token-id must not be negative"),
        ("--mdm-rate-sampler gauss", "argument --mdm-rate-sampler: invalid choice: 'gauss'"),
        ("--mdm-quantiles sobol", "argument --mdm-quantiles: invalid choice: 'sobol'"),
        ("--mdm-mask span", "argument --mdm-mask: invalid choice: 'span'"),
        ("--mdm-head half", "argument --mdm-head: invalid choice: 'half'"),
        ("--mdm-pad-response-to-multiple-of 0", "multiple-of must be at least 1"),
        ("--mdm-pad-response-to-multiple-of 8", "needs the packed pairs of --mdm-sft and --mdm-is"),
        ("--mdm-pad-response-to-multiple-of 8 --mdm-sft", "is filled up with its end by --mdm"),
        (
            "--mdm-pad-response-to-multiple-of 8 --mdm-sft --mdm-isolate-documents "
            "--no-mdm-eod-eligible",
            "leave out --no-mdm-eod-eligible",
        ),
        (
            "--mdm-sft --mdm-isolate-documents --mdm-pad-eligible",
            "use --mdm-pad-response-to-multiple-of",
        ),
        ("--mdm-block-size 0", "--mdm-block-size must be at least 1"),
        ("--mdm-block-size 64", "a block of 64 tokens is longer than a row of --seq-length 32"),
        ("--mdm-block-size 4 --mdm-block-size-schedule 0:4", "exclude each other"),
        ("--mdm-block-size-schedule 4", "--mdm-block-size-schedule takes phases START:SIZE"),
        ("--mdm-rate-per block", "--mdm-rate-per block needs --mdm-block-size"),
        ("--mdm-ar-loss-weight 0.5", "--mdm-ar-loss-weight needs --mdm-block-size"),
        ("--mdm-block-size 4 --mdm-ar-loss-weight -1", "must not be negative"),
        (
            "--mdm-block-size-schedule 0:row --mdm-ar-loss-weight 0.5",
            "--mdm-ar-loss-weight needs clean tokens",
        ),
        (
            f"{ONLINE} --mdm-ppots-target gradient --mdm-block-size 4 --mdm-shift "
            "--mdm-ar-loss-weight 0.1",
            "use --mdm-ppots-target loss",
        ),
        ("--mdm-shift --mdm-shift-first noisy", "--mdm-shift-first needs --mdm-block-size"),
        ("--mdm-block-size 4 --mdm-shift-first noisy", "--mdm-shift-first noisy needs --mdm-shift"),
        ("--mdm-block-size 4 --mdm-anneal-attention-iters 9", "which begins causal at block size"),
        (
            "--mdm-block-size 4 --num-experts 2 --moe-token-dispatcher-type flex "
            "--moe-flex-dispatcher-backend hybridep",
            "whose buffers keep the number of positions of the first step: use deepep",
        ),
        ("--mdm-confidence-loss -1", "--mdm-confidence-loss takes a weight from 0 on, got -1.0"),
        ("--mdm-confidence-loss nan", "--mdm-confidence-loss takes a weight from 0 on, got nan"),
        (
            "--mdm-confidence-loss 1 --cross-entropy-loss-fusion",
            "--mdm-confidence-loss does not go with --cross-entropy-loss-fusion",
        ),
        ("--cuda-graph-impl full_iteration", "--cuda-graph-impl needs logits of one shape"),
        ("--defer-embedding-wgrad-compute", "add --mdm-head full"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
        ("--mdm-isad-token-ids 3 --mdm-isad-delta 1.5", "--mdm-isad-delta must lie in [0, 1]"),
        ("--mdm-isad-delta 0.2", "--mdm-isad-delta needs --mdm-isad-token-ids: it does nothing"),
        ("--mdm-isad-weight exact", "--mdm-isad-weight needs --mdm-isad-token-ids"),
        ("--mdm-sft --mdm-syrm-fraction 2", "--mdm-syrm-fraction must lie in [0, 1]"),
        ("--mdm-views 0", "--mdm-views must be at least 1"),
        ("--mdm-views 3", "--micro-batch-size 2 is not a multiple of --mdm-views 3"),
        ("--mdm-rate-sampler ppots", "needs --mdm-ppots-file or --mdm-ppots-refit-interval"),
        ("--mdm-ppots-file x.json", "--mdm-ppots-file needs --mdm-rate-sampler ppots"),
        (f"{FITTED} --mdm-ppots-target gradient", "--mdm-ppots-target needs --mdm-ppots-refit-"),
        (f"{FITTED} --mdm-ppots-decay 0.2", "--mdm-ppots-decay needs --mdm-ppots-refit-interval"),
        (f"{ONLINE} --mdm-ppots-decay 2", "--mdm-ppots-decay must lie in [0, 1]"),
        (f"{ONLINE} --mdm-ppots-uniform-share 0", "--mdm-ppots-uniform-share must lie in (0, 1]"),
        (f"{ONLINE} --mdm-ppots-bins 0", "--mdm-ppots-bins must lie in 1..1022, got 0"),
        (f"{ONLINE} --mdm-ppots-bins 5000", "--mdm-ppots-bins must lie in 1..1022, got 5000"),
        (f"{ONLINE} --ckpt-format torch", "--ckpt-format torch does not save the measurements of"),
        ("--mdm-rate-sampler beta", "--mdm-rate-sampler beta needs --mdm-beta"),
        ("--mdm-beta 2 2", "--mdm-beta needs --mdm-rate-sampler beta"),
        ("--mdm-logit-normal 0 1", "--mdm-logit-normal needs --mdm-rate-sampler logit-normal"),
        (f"{BELL} --mdm-beta 2 2", "--mdm-beta needs --mdm-rate-sampler beta"),
        (f"{BELL} 1", "--mdm-logit-normal takes MEAN and STD, got 3 numbers"),
        (
            "--mdm-rate-sampler logit-normal --mdm-logit-normal 0 0",
            "STD of --mdm-logit-normal must",
        ),
        (
            "--mdm-rate-sampler beta --mdm-beta inf 2",
            "A of --mdm-beta must lie in [1, 100], got inf",
        ),
        ("--mdm-bell-uniform-share 0.5", "needs --mdm-rate-sampler logit-normal or beta: it does"),
        ("--mdm-bell-role weight", "--mdm-bell-role needs --mdm-rate-sampler logit-normal or beta"),
        (
            f"{ONLINE} --mdm-bell-fade 0 0.9",
            "--mdm-bell-fade needs --mdm-rate-sampler logit-normal or",
        ),
        (f"{BELL} --mdm-bell-uniform-share 0", "--mdm-bell-uniform-share must lie in (0, 1]: 0.0"),
        (
            f"{BELL} --mdm-bell-role proposal --mdm-bell-uniform-share 0.05",
            "--mdm-bell-role proposal needs --mdm-bell-uniform-share 0.1 or more, got 0.05",
        ),
        (
            f"{BELL} --mdm-bell-fade 0 0.9 --mdm-bell-role weight",
            "--mdm-bell-fade needs --mdm-bell-role objective, got weight",
        ),
        (f"{BELL} --mdm-bell-fade 0.5", "--mdm-bell-fade takes 0 <= START <= END < 1, got 0.5"),
        (f"{BELL} --mdm-bell-fade 0.5 1", "takes 0 <= START <= END < 1, got 0.5 1.0"),
        (f"{BELL} --mdm-bell-fade 0.7 0.4", "takes 0 <= START <= END < 1, got 0.7 0.4"),
        (f"{BELL} --mdm-bell-fade 0 nan", "takes 0 <= START <= END < 1, got 0.0 nan"),
        (f"{BELL} --mdm-ppots-refit-interval 5", "needs --mdm-rate-sampler ppots"),
        (f"{BELL} --mdm-bell-fade 0 0.9 --mdm-ppots-file x", "needs --mdm-rate-sampler ppots"),
        ("--mdm-strata 2", "--mdm-strata and --mdm-strata-window need --mdm-quantiles strata"),
        ("--mdm-quantiles strata --mdm-strata 0", "--mdm-strata must lie in 1.."),
        (
            "--mdm-quantiles strata --mdm-strata 9 --mdm-strata-window 8",
            "--mdm-strata 9 exceeds the --mdm-strata-window of 8",
        ),
        (
            "--mdm-quantiles strata --step-batch-size-schedule 0:4",
            "give --mdm-strata-window",
        ),
        ("--dataloader-type cyclic", "use --dataloader-type single"),
        ("--dataloader-type external", "use --dataloader-type single"),
        ("--transformer-impl inference_optimized", "--transformer-impl inference_optimized"),
        ("--micro-batch-size 0", "--micro-batch-size must be at least 1"),
        ("--global-batch-size 0", "--global-batch-size 0 is not a multiple"),
        ("--global-batch-size 7", "--global-batch-size 7 is not a multiple of --micro-batch-size"),
        ("--eval-global-batch-size 3", "--eval-global-batch-size 3 is not a multiple"),
        ("--eval-micro-batch-size 3", "--eval-micro-batch-size 3 x 1"),
        ("--step-batch-size-schedule 0:4", "--step-batch-size-schedule needs --train-samples, "),
        (
            "--step-batch-size-schedule 0:4,99:5 --train-samples 80",
            "--step-batch-size-schedule: 5 of 99:5",
        ),
        ("--tensor-model-parallel-size 0", "--tensor-model-parallel-size must be at least 1"),
        ("--tensor-model-parallel-size 2", "1 ranks cannot be divided into model replicas of 2"),
        ("--expert-model-parallel-size 2", "--expert-model-parallel-size"),
        (
            "--recompute-granularity selective --recompute-modules core_attn layernorm",
            "--recompute-modules layernorm needs --transformer-impl transformer_engine",
        ),
        ("--hybrid-layer-pattern M*M-", "M*M-: M is a Mamba layer, which is causal; use *"),
        ("--hybrid-layer-pattern G-", "G-: G is a gated delta net, which is causal"),
        ("--hybrid-layer-pattern *-/*-", "/ is the beginning of multi-token prediction"),
        ("--hybrid-layer-pattern *x", "*x: x is not a layer of Megatron's"),
        ("--hybrid-layer-pattern *E", "needs --num-experts for its E layers"),
        ("--hybrid-layer-pattern *- --use-rope-scaling", "--use-rope-scaling does not reach"),
        (
            "--log-throughput --attention-output-gate",
            "--log-throughput does not count --attention-output-gate",
        ),
        ("--multi-latent-attention", "--multi-latent-attention needs --transformer-impl transf"),
        ("--num-experts 4 --moe-router-topk 8", "--moe-router-topk 8 exceeds --num-experts 4"),
        (
            "--num-experts 4 --moe-router-load-balancing-type seq_aux_loss sinkhorn",
            "sinkhorn makes the routing of a row depend on the other rows in its micro-batch: "
            "use seq_aux_loss",
        ),
        (
            "--num-experts 4 --moe-router-load-balancing-type quantile_balancing "
            "--mdm-random-length-fraction 0.1",
            "quantile_balancing does not go with --mdm-random-length-fraction",
        ),
        ("--seed -1", "--seed must lie in 1.."),
        ("--seed 0", "--seed must lie in 1.."),
        ("--mdm-rate-bins 1000000000", "--mdm-rate-bins must lie in 1..10000, got 1000000000"),
        (
            "--mdm-quantiles strata --mdm-strata-window 1000000000000",
            "--mdm-strata-window must lie in 1..16777216, got 1000000000000",
        ),
        ("--train-iters 0", "--train-iters must be at least 1, got 0"),
        ("--train-samples 0", "--train-samples must be at least 1, got 0"),
        ("--eval-interval 0", "--eval-interval must be at least 1, got 0"),
        ("--eval-iters -1", "--eval-iters must be at least 0, got -1"),
        ("--log-interval 0", "--log-interval must be at least 1, got 0"),
        ("--num-workers -1", "--num-workers must be at least 0, got -1"),
        ("--save x", "--save needs --save-interval"),
        ("--save x --save-interval 0", "--save-interval must be at least 1, got 0"),
        ("--lr -1", "--min-lr 0.0 and --lr -1.0: give numbers from 0 on"),
        ("--min-lr 1", "--min-lr 1.0 and --lr 0.01: give numbers"),
        ("--lr nan", "--min-lr 0.0 and --lr nan: give numbers"),
        ("--lr-warmup-init 1", "--lr-warmup-init 1.0 and --lr 0.01"),
        ("--decoupled-lr 1e-3 --decoupled-min-lr -1", "--decoupled-min-lr must not be negative"),
        ("--weight-decay -1", "the weight decay goes from -1.0 to -1.0"),
        ("--weight-decay-incr-style linear", "needs --start-weight-decay and --end-weight-decay"),
        ("--lr-warmup-iters 5", "--lr-warmup-iters 5 must lie in 0..4: the schedule ends with --t"),
        ("--lr-warmup-iters 3 --lr-decay-iters 3", "0..2: the schedule ends with --lr-decay-iters"),
        ("--lr-warmup-samples 3", "--lr-warmup-samples goes with --train-samples, and this run"),
        ("--train-samples 9 --lr-warmup-iters 3", "--lr-warmup-iters goes with --train-iters, and"),
        ("--lr-warmup-fraction 1", "--lr-warmup-fraction must lie in [0, 1): 1.0"),
        ("--lr-warmup-fraction 0.1 --lr-warmup-iters 1", "say the same: leave one of them out"),
        ("--lr-decay-style WSD", "WSD needs --lr-wsd-decay-iters, the length of its decay"),
        ("--optimizer sgd --use-distributed-optimizer", "--optimizer sgd has no state that"),
        ("--kv-channels 15", "rope rotates pairs of channels: 15 of a head"),
        ("--hidden-size 30 --num-attention-heads 2", "15 of a head (--kv-channels, by default"),
        ("--kv-channels 12 --rotary-percent 0.25", "rope rotates pairs of channels: 3 of a head"),
    ],
)
def test_flags_that_cannot_work(flags, message, monkeypatch):
    with pytest.raises(UserError) as caught:
        arguments.validate_flags(parsed(monkeypatch, *flags.split()))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["--train-iters", "--eval-interval", "--lr"])
def test_what_a_run_needs(name, monkeypatch):
    args = parsed(monkeypatch)
    setattr(args, name[2:].replace("-", "_"), None)
    with pytest.raises(UserError, match=f"^{name} is missing: "):
        arguments.validate_flags(args)
    args.skip_train = True
    if name == "--lr":
        arguments.validate_flags(args)
        return
    with pytest.raises(UserError, match=f"^{name} is missing: "):
        arguments.validate_flags(args)


@pytest.mark.parametrize(
    "flags",
    [
        "--lr-decay-style WSD --lr-wsd-decay-iters 0",
        "--lr-decay-style WSD --lr-wsd-decay-iters 9",
        "--decoupled-lr 1e-4 --decoupled-min-lr 2e-4",
        "--exit-interval 0",
        "--lr-warmup-fraction 0.5",
        "--min-lr 1e-2",
        "--eval-iters 0 --eval-interval 9999",
        "--mdm-quantiles strata --mdm-strata-window 1048576",
        "--mdm-rate-sampler flat",
        "--mdm-rate-sampler logit-normal --mdm-logit-normal -0.3 0.5 --mdm-bell-role proposal",
        "--mdm-rate-sampler beta --mdm-beta 1 4 --mdm-bell-uniform-share 1",
        f"{BELL} --mdm-bell-fade 0.5 0.5 --mdm-ppots-refit-interval 5 --mdm-ppots-bins 8",
    ],
)
def test_flags_that_work(flags, monkeypatch):
    """Megatron accepts these flags, so a refusal would stop a run that can train."""
    arguments.validate_flags(parsed(monkeypatch, *flags.split()))


@pytest.mark.parametrize(
    "split", ["0,0,0", "-1,1,0", "90,abc5,5", "", "1,1,1,1", "1e2,1,0", "1..2", "nan"]
)
def test_splits_of_other_things_than_shares(split):
    with pytest.raises(
        UserError, match=f"^--split {re.escape(split)} is not three shares of the data"
    ):
        data_files.check_split(split)


@pytest.mark.parametrize(
    "split", ["95,5,0", "969, 30, 1", ".9 .1 0", "949/50/1", "1", "9,1,", "[9,1,0]", "9:1", None]
)
def test_splits(split):
    data_files.check_split(split)


@pytest.mark.parametrize("split, parts", [("100,0,0", None), ("1", None), (None, [["a"], None])])
def test_a_validation_without_rows(split, parts):
    with pytest.raises(UserError, match="^--eval-iters 3 needs validation rows, and .* leaves non"):
        data_files.check_validation(3, split, parts)


@pytest.mark.parametrize("split, parts", [("90,10,0", None), ("9 .1", None), (None, ["a", "b"])])
def test_a_validation_with_rows(split, parts):
    data_files.check_validation(3, split, parts)


@pytest.mark.parametrize(
    ("flags", "split", "message"),
    [
        ("--data-path a --data-args-path b", "9,1,0", "--data-path and --data-args-path name the"),
        ("--data-args-path a --valid-data-path b", None, "--data-args-path and --valid-data-path "),
        ("--data-args-path a", None, "--data-args-path needs --split, the shares for training"),
        ("--train-data-path a", "9,1,0", "--split 9,1,0 does not go with --train-data-path, which"),
        (
            "--per-split-data-args-path a",
            "1",
            "--split 1 does not go with --per-split-data-args-pa",
        ),
    ],
)
def test_flags_that_name_no_data_or_too_many(flags, split, message, monkeypatch):
    args = parsed(monkeypatch, data=flags.split())
    args.split = split
    with pytest.raises(UserError) as caught:
        arguments.validate_flags(args)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("flags", "split"),
    [
        ("--data-path a", None),  # Megatron has a default
        ("--data-path 0.7 a 0.3 b", "9,1,0"),
        ("--data-args-path a", "9,1,0"),
        ("--train-data-path a --valid-data-path b", None),
        ("--per-split-data-args-path a", None),
    ],
)
def test_flags_that_name_data(flags, split, monkeypatch):
    args = parsed(monkeypatch, data=flags.split())
    args.split = split
    arguments.validate_flags(args)


def test_batches_and_sizes_count_the_ranks(monkeypatch):
    arguments.validate_flags(parsed(monkeypatch, world=4))  # 2 x 4 = 8
    with pytest.raises(UserError, match="--global-batch-size 8 is not .* 2 x 8 data-parallel"):
        arguments.validate_flags(parsed(monkeypatch, world=8))
    with pytest.raises(UserError, match="3 ranks .* --pipeline-model-parallel-size 2"):
        arguments.validate_flags(
            parsed(monkeypatch, "--pipeline-model-parallel-size", "2", world=3)
        )


def test_sequence_parallel_cuts_rows_evenly(monkeypatch):
    words = "--tensor-model-parallel-size 2 --sequence-parallel --seq-length 33".split()
    with pytest.raises(UserError, match="cuts rows into 2 parts .*: --seq-length 33 must be"):
        arguments.validate_flags(parsed(monkeypatch, *words, world=2))
    arguments.validate_flags(parsed(monkeypatch, *words[:2], *words[3:], world=2))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--global-batch-size 2", "--global-batch-size 2 makes 1 micro-batches a rank, which"),
        ("--global-batch-size 6", "--global-batch-size 6 makes 3 micro-batches a rank, which"),
        ("--eval-iters 1 --eval-global-batch-size 10", "--eval-global-batch-size 10 makes 5"),
        ("--eval-iters 0 --eval-global-batch-size 10", None),
        (
            "--step-batch-size-schedule 0:4,99:6 --train-samples 80",
            "--step-batch-size-schedule: 6 of 99:6 makes 3",
        ),
        (
            "--global-batch-size 14 --microbatch-group-size-per-virtual-pipeline-stage 3",
            "makes 7 micro-batches a rank, which virtual stages cannot process: they take one or "
            "more full groups of 3, and then at most one smaller group, of at least 2 "
            "(--pipeline-model-parallel-size)",
        ),
        ("--global-batch-size 10 --microbatch-group-size-per-virtual-pipeline-stage 3", None),
    ],
)
def test_virtual_stages_and_numbers_of_micro_batches(flags, message, monkeypatch):
    words = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1".split()
    args = parsed(monkeypatch, *words, *flags.split(), world=2)
    arguments.validate_flags(args)  # Megatron's validation sets the number of stages later
    args.virtual_pipeline_model_parallel_size = 2
    if message is None:
        arguments.validate_flags(args)
        return
    with pytest.raises(UserError) as caught:
        arguments.validate_flags(args)
    assert message in str(caught.value)


def test_only_megatrons_own_exceptions_become_a_line():
    """Any other failure while the model is prepared is a bug, and shows its traceback."""

    def refuse():
        TransformerConfig(
            num_layers=2, hidden_size=32, num_attention_heads=3, tensor_model_parallel_size=2
        )

    def fail():
        assert not "a mistake of ours"

    def fail_in_torch():
        torch.nn.MultiheadAttention(embed_dim=3, num_heads=2)

    rejection = pytest.raises(UserError, match="^Megatron rejects these flags or their files: ")
    with rejection, arguments.megatron_errors_as_user_errors():
        refuse()
    for bug in (fail, fail_in_torch):
        with pytest.raises(AssertionError), arguments.megatron_errors_as_user_errors():
            bug()
    with pytest.raises(UserError, match="^ours$"), arguments.megatron_errors_as_user_errors():
        raise UserError("ours")


REFUSED_VALUES = {
    "mtp_num_layers": "1",
    "window_size": "8,0",
    "hybrid_override_pattern": "*-",
    "mtp_hybrid_override_pattern": "*-",
    "moe_expert_capacity_factor": "1.0",
    "experimental_attention_variant": "gated_delta_net",
    "phase_transition_iterations": "5",
    "rampup_batch_size": "2 2 8",
    "iterations_to_skip": "3",
    "non_persistent_ckpt_type": "global",
    "spec": "module name",
}


@pytest.mark.parametrize("name", [name for name in arguments.REFUSED if name != "yaml_cfg"])
def test_refused_flags_are_real_and_refused(name, monkeypatch):
    """The message names a flag of Megatron's, and giving this flag is refused."""
    words = [flag(name), *REFUSED_VALUES.get(name, "").split()]
    args = parsed(monkeypatch, *words)  # fails if Megatron has no such flag
    with pytest.raises(UserError, match=f"^{flag(name)} cannot be used with masked diffusion: "):
        arguments.validate_flags(args)


def test_help_shows_every_flag(monkeypatch, capsys):
    """Formatting Megatron's own help texts once failed."""
    monkeypatch.setattr(sys, "argv", ["pretrain", "--help"])
    with pytest.raises(SystemExit) as ended:
        arguments.parse()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--mdm-mask-token-id" in text
    assert "--tensor-model-parallel-size" in text
    assert "Names of the files of --valid-data-path" in " ".join(text.split())


@pytest.mark.parametrize("field", fields(MDMConfig), ids=lambda field: field.name)
def test_help_shows_the_default_of_every_flag_of_ours(field):
    parser = arguments.add_arguments(ArgumentParser())
    (action,) = (a for a in parser._actions if a.dest == destination(field.name))
    text = parser._get_formatter()._expand_help(action)
    about, *default = text.split(" Default: ")
    assert about.endswith((".", ")")) and len(default) == 1 and default[0].endswith(".")
    if field.default is False:
        assert default == ["off."]
    elif field.default is True:
        assert action.option_strings[0] == f"--no-mdm-{field.name.replace('_', '-')}"
        assert default[0] != f"{field.default}."
    elif field.default is not None:
        assert default == [f"{field.default}."]


def test_experts_under_tensor_parallel_need_sequence_parallel(monkeypatch):
    """Without it, Megatron would fail in the first forward pass."""
    words = ["--num-experts", "4", "--tensor-model-parallel-size", "2"]
    with pytest.raises(UserError, match="^--num-experts .* needs --sequence-parallel$"):
        arguments.validate_flags(parsed(monkeypatch, *words, world=2))
    arguments.validate_flags(parsed(monkeypatch, *words, "--sequence-parallel", world=2))


def test_context_parallel_needs_transformer_engine(monkeypatch):
    words = ["--context-parallel-size", "2"]
    with pytest.raises(UserError, match="^--context-parallel-size .* needs --transformer-impl tra"):
        arguments.validate_flags(parsed(monkeypatch, *words, world=2))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    words += ["--transformer-impl", "transformer_engine"]
    arguments.validate_flags(parsed(monkeypatch, *words, world=2))
    with pytest.raises(UserError, match="leave out --mdm-isolate-documents and every other"):
        arguments.validate_flags(parsed(monkeypatch, *words, "--mdm-isolate-documents", world=2))


def test_blocks_with_transformer_engine(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    words = ["--mdm-block-size", "4", "--transformer-impl", "transformer_engine", "--bf16"]
    args = parsed(monkeypatch, *words)
    arguments.validate_flags(args)
    arguments._demand_fused_attention(args)
    assert args.attention_backend is AttnBackend.fused
    refused = {
        "--attention-backend flash": "flash, which takes no mask",
        "--multi-latent-attention": "numbers the copies of a token as different positions",
        "--tp-comm-overlap": "--mdm-block-size does not go with --tp-comm-overlap",
    }
    for flags, line in refused.items():
        with pytest.raises(UserError, match=line):
            arguments.validate_flags(parsed(monkeypatch, *words, *flags.split()))
    args = parsed(monkeypatch, *words)
    args.fp8_dot_product_attention = True  # no flag sets it, but a script may
    with pytest.raises(UserError, match="attention in FP8, which takes no mask"):
        arguments.validate_flags(args)
    with pytest.raises(UserError, match="needs --bf16 or --fp16"):
        arguments.validate_flags(parsed(monkeypatch, *words[:-1]))
    unfused = parsed(monkeypatch, *words[:-1], "--attention-backend", "unfused")
    arguments.validate_flags(unfused)
    arguments._demand_fused_attention(unfused)
    assert unfused.attention_backend is AttnBackend.unfused


def test_blocks_with_context_parallelism(monkeypatch):
    """The mask of blocks divides documents too, but whole rows would lack theirs."""
    words = "--context-parallel-size 2 --mdm-isolate-documents --bf16".split()
    blocks = [*words, "--mdm-block-size", "4"]
    with pytest.raises(UserError, match="needs --transformer-impl transformer_engine"):
        arguments.validate_flags(parsed(monkeypatch, *blocks, world=2))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    words, blocks = (
        [*flags, "--transformer-impl", "transformer_engine"] for flags in (words, blocks)
    )
    arguments.validate_flags(parsed(monkeypatch, *blocks, world=2))
    for kind in ("a2a", "all_gather"):
        with pytest.raises(UserError, match=f"--cp-comm-type {kind}, which takes no mask: use p2p"):
            arguments.validate_flags(parsed(monkeypatch, *blocks, "--cp-comm-type", kind, world=2))
    whole = "cuts the whole rows of a schedule or an evaluation without regard to documents"
    for flags in (
        [*words, "--mdm-block-size-schedule", "0:4 9:row"],
        [*blocks, "--mdm-eval-block-sizes", "4", "row"],
    ):
        with pytest.raises(UserError, match=whole):
            arguments.validate_flags(parsed(monkeypatch, *flags, world=2))
    flags.remove("--mdm-isolate-documents")
    arguments.validate_flags(parsed(monkeypatch, *flags, world=2))


def test_validation_rows_do_not_follow_from_the_layout(monkeypatch):
    words = ["--eval-iters", "1", "--step-batch-size-schedule", "0:4 99:8"]
    words += ["--train-samples", "80"]
    with pytest.raises(UserError, match="give --eval-global-batch-size$"):
        arguments.validate_flags(parsed(monkeypatch, *words))
    arguments.validate_flags(parsed(monkeypatch, *words, "--eval-global-batch-size", "8"))


@pytest.mark.parametrize("flag_of", ["--no-mdm-pad-attended", "--no-mdm-eod-attended"])
def test_hidden_tokens_need_local_layers(flag_of, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    words = [flag_of, "--transformer-impl", "transformer_engine"]
    with pytest.raises(UserError, match=flag_of):
        arguments.validate_flags(parsed(monkeypatch, *words))


def test_a_yaml_file_is_refused_before_megatron_reads_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain", "--yaml-cfg=missing.yaml"])
    with pytest.raises(UserError, match="^--yaml-cfg cannot be used with masked diffusion: "):
        arguments.parse()


def test_defaults_are_not_refused(monkeypatch):
    arguments.validate_flags(parsed(monkeypatch))


@pytest.mark.parametrize("words", ["--fp8-format hybrid", "--transformer-impl transformer_engine"])
def test_transformer_engine_is_asked_for_and_missing(words, monkeypatch):
    args = parsed(monkeypatch, *words.split())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"^{words.split()[0]}.* needs Transformer Engine"):
        arguments.validate_flags(args)


def test_fp4_without_transformer_engine(monkeypatch):
    args = parsed(monkeypatch, "--fp4-format", "e2m1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="^--fp4-format needs Transformer Engine"):
        arguments.validate_flags(args)


def test_a_file_in_the_place_of_the_logs(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/logs/run"):
        args = parsed(monkeypatch, "--tensorboard-dir", str(path))
        with pytest.raises(UserError) as caught:
            arguments.validate_flags(args)
        assert str(caught.value).startswith(
            f"--tensorboard-dir {path} cannot be made: {tmp_path / 'file'} is no directory"
        )
    for path in (tmp_path, tmp_path / "new/run", "new", "hdfs://host/run"):
        arguments.validate_flags(parsed(monkeypatch, "--tensorboard-dir", str(path)))
