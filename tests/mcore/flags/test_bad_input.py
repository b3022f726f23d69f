"""Bad input ends with one clear line, a status other than 0, and no rank left waiting."""

import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.training.arguments import parse_args

from megatron_mdm import errors, pretrain
from megatron_mdm.config import flag
from megatron_mdm.environment import ALONE, STARTED_TOGETHER, check_megatron_version, join_ranks
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.flags import arguments, data_files
from tests import ranks

FITTED = "--mdm-rate-sampler ppots --mdm-ppots-file x.json"
ONLINE = "--mdm-rate-sampler ppots --mdm-ppots-refit-interval 5"
COMMON = [*ranks.MODEL, *ranks.TOKENIZER, *ranks.TRAINING]


def parsed(monkeypatch, *flags, world=1, data=("--mock-data",)):
    monkeypatch.setattr(sys, "argv", ["pretrain", *COMMON, *data, *flags])
    monkeypatch.setenv("WORLD_SIZE", str(world))
    return parse_args(arguments._quiet_parser)


def the_error_line(output):
    """The only line of these logs that says what is wrong; nothing else looks like a failure."""
    text = "".join(output)
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text[-3000:]
    assert "Traceback" not in text and "Exception ignored" not in text, text[-3000:]
    return lines[0]


# -- flags


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
        (f"{ONLINE} --ckpt-format torch", "--ckpt-format torch would leave out what"),
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
        ("--step-batch-size-schedule 0:4,99:5", "--step-batch-size-schedule: 5 of 99:5"),
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
        ("--multi-latent-attention", "--multi-latent-attention needs --transformer-impl transf"),
        ("--num-experts 4 --moe-router-topk 8", "--moe-router-topk 8 exceeds --num-experts 4"),
        (
            "--num-experts 4 --moe-router-load-balancing-type seq_aux_loss sinkhorn",
            "sinkhorn routes a row by what else is in its micro-batch: use seq_aux_loss",
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
        ("--kv-channels 15", "rope turns pairs of channels: 15 of a head"),
        ("--hidden-size 30 --num-attention-heads 2", "15 of a head (--kv-channels, by default"),
        ("--kv-channels 12 --rotary-percent 0.25", "rope turns pairs of channels: 3 of a head"),
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
    ],
)
def test_flags_that_work(flags, monkeypatch):
    """Megatron takes them: a refusal would stop a run that trains."""
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
        ("--step-batch-size-schedule 0:4,99:6", "--step-batch-size-schedule: 6 of 99:6 makes 3"),
        (
            "--global-batch-size 14 --microbatch-group-size-per-virtual-pipeline-stage 3",
            "makes 7 micro-batches a rank, which virtual stages cannot take: they go through them "
            "3 at a time, and 2 (--pipeline-model-parallel-size) at least must be left",
        ),
        ("--global-batch-size 10 --microbatch-group-size-per-virtual-pipeline-stage 3", None),
    ],
)
def test_virtual_stages_and_numbers_of_micro_batches(flags, message, monkeypatch):
    words = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1".split()
    args = parsed(monkeypatch, *words, *flags.split(), world=2)
    arguments.validate_flags(args)  # the number of stages follows in Megatron's validation
    args.virtual_pipeline_model_parallel_size = 2
    if message is None:
        arguments.validate_flags(args)
        return
    with pytest.raises(UserError) as caught:
        arguments.validate_flags(args)
    assert message in str(caught.value)


def test_only_megatrons_own_exceptions_become_a_line():
    """Whatever else fails while the model is prepared is a bug, and shows its traceback."""

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
    """The flag in the message is one of Megatron's, and giving it is what is refused."""
    words = [flag(name), *REFUSED_VALUES.get(name, "").split()]
    args = parsed(monkeypatch, *words)  # fails if Megatron has no such flag
    with pytest.raises(UserError, match=f"^{flag(name)} cannot be used with masked diffusion: "):
        arguments.validate_flags(args)


def test_help_shows_every_flag(monkeypatch, capsys):
    """Megatron's own texts once made it fail."""
    monkeypatch.setattr(sys, "argv", ["pretrain", "--help"])
    with pytest.raises(SystemExit) as ended:
        arguments.parse()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--mdm-mask-token-id" in text
    assert "--tensor-model-parallel-size" in text


def test_experts_under_tensor_parallel_need_sequence_parallel(monkeypatch):
    """Megatron would fail in the first forward pass."""
    words = ["--num-experts", "4", "--tensor-model-parallel-size", "2"]
    with pytest.raises(UserError, match="^--num-experts .* needs --sequence-parallel$"):
        arguments.validate_flags(parsed(monkeypatch, *words, world=2))
    arguments.validate_flags(parsed(monkeypatch, *words, "--sequence-parallel", world=2))


def test_context_parallel_needs_transformer_engine(monkeypatch):
    words = ["--context-parallel-size", "2"]
    with pytest.raises(UserError, match="^--context-parallel-size .* needs --transformer-impl tra"):
        arguments.validate_flags(parsed(monkeypatch, *words, world=2))
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: name)
    words += ["--transformer-impl", "transformer_engine"]
    arguments.validate_flags(parsed(monkeypatch, *words, world=2))
    with pytest.raises(UserError, match="leave out --mdm-isolate-documents and every other"):
        arguments.validate_flags(parsed(monkeypatch, *words, "--mdm-isolate-documents", world=2))


def test_validation_rows_do_not_follow_from_the_layout(monkeypatch):
    words = ["--eval-iters", "1", "--step-batch-size-schedule", "0:4 99:8"]
    with pytest.raises(UserError, match="give --eval-global-batch-size$"):
        arguments.validate_flags(parsed(monkeypatch, *words))
    arguments.validate_flags(parsed(monkeypatch, *words, "--eval-global-batch-size", "8"))


@pytest.mark.parametrize("flag_of", ["--no-mdm-pad-attended", "--no-mdm-eod-attended"])
def test_hidden_tokens_need_local_layers(flag_of, monkeypatch):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: name)
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
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"^{words.split()[0]}.* needs Transformer Engine"):
        arguments.validate_flags(args)


def test_fp4_without_transformer_engine(monkeypatch):
    args = parsed(monkeypatch, "--fp4-format", "e2m1")
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="^--fp4-format needs Transformer Engine"):
        arguments.validate_flags(args)


# -- versions and devices


@pytest.mark.parametrize("installed", ["0.18.0", "0.19.1", "0.20.0", "1.0"])
def test_other_versions_of_megatron(installed, monkeypatch):
    monkeypatch.setattr("megatron_mdm.environment.version", lambda name: installed)
    with pytest.raises(UserError, match=f"^megatron-core {installed} is not supported: pip"):
        check_megatron_version()


@pytest.mark.parametrize("installed", ["0.19.2", "0.19.2+cu13", "0.19.10", "0.19.3rc1"])
def test_supported_versions_of_megatron(installed, monkeypatch):
    monkeypatch.setattr("megatron_mdm.environment.version", lambda name: installed)
    check_megatron_version()


def test_no_megatron(monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("megatron_mdm.environment.version", version)
    with pytest.raises(UserError, match="^megatron-core is not installed: pip install"):
        check_megatron_version()


def run_main(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["pretrain", *argv])
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # so that main's setting is undone
    with pytest.raises(SystemExit) as caught:
        pretrain.main()
    return caught.value.code


def test_no_gpu_names_the_flag(monkeypatch, capfd):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run_main(monkeypatch, *ranks.MODEL) == 2
    assert "add --mdm-device cpu" in the_error_line(capfd.readouterr())


# -- without a launcher


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2, and LOCAL_RANK is not set: start the"),
        (
            {"SLURM_STEP_NUM_TASKS": "8"},
            "SLURM_STEP_NUM_TASKS is 8, and RANK is not set: start the",
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "2"},
            "OMPI_COMM_WORLD_SIZE is 2, and RANK is not set: start the",
        ),
    ],
)
def test_one_of_several_ranks_that_no_torchrun_started(environment, message, monkeypatch):
    clear_launcher(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        join_ranks()


def test_a_process_that_nobody_launched_is_a_run_of_one_rank(monkeypatch):
    clear_launcher(monkeypatch)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    join_ranks()
    assert {name: os.environ[name] for name in ALONE} == ALONE
    # torchrun under srun, one a node
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("WORLD_SIZE", "16")
    join_ranks()
    assert os.environ["WORLD_SIZE"] == "16"


def clear_launcher(monkeypatch):
    for name in (*ALONE, *STARTED_TOGETHER):
        monkeypatch.setenv(name, "")  # so that what is set later is undone
        monkeypatch.delenv(name)


def test_the_program_trains_without_torchrun(tmp_path):
    """Worth a start of its own: all others set what torchrun sets."""
    names = (*ALONE, *STARTED_TOGETHER)
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-m", "megatron_mdm.pretrain", *COMMON, "--mock-data"]
    run = subprocess.run(
        [*command, "--train-iters", "1", "--split", "1,0,0"],
        capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert "iteration        1/       1" in run.stdout


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


# -- which rank prints


def exit_output(monkeypatch, capsys, message, connected, **environment):
    monkeypatch.setattr(parallel_state, "_DATA_PARALLEL_GROUP", object() if connected else None)
    monkeypatch.setattr(errors.time, "sleep", lambda seconds: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        errors.exit_rank_with(UserError(message))
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "connected, environment, printed",
    [
        (False, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "error: oh\n"),
        # The first rank has had its time to find it too.
        (False, {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "error: rank 1: oh\n"),
        (False, {"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "16"}, "error: oh\n"),
        (True, {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "error: rank 1: oh\n"),
        (True, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "error: oh\n"),
    ],
)
def test_who_prints(connected, environment, printed, monkeypatch, capsys):
    assert exit_output(monkeypatch, capsys, "oh", connected, **environment) == printed


def test_a_launcher_stops_a_rank_that_waits_for_the_first_one():
    """Also where the program answers SIGTERM in a way of its own."""
    code = (
        "import signal\n"
        "from megatron_mdm.errors import UserError, exit_rank_with\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "print('ready', flush=True)\n"
        "exit_rank_with(UserError('oh'))"
    )
    environment = {**os.environ, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as process:
        process.stdout.readline()
        while process.poll() is None:
            process.terminate()
            time.sleep(0.05)
        assert process.returncode == -signal.SIGTERM
        assert process.stderr.read() == b""


def test_the_message_of_a_loader_worker_is_one_line():
    text = (
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        'last):\n  File "x.py", line 1\nmegatron_mdm.errors.UserError: row 3 contains it\n'
    )
    assert str(UserError(text)) == "row 3 contains it"


# -- data files


def truncate(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def damage(path, at, value):
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(bytes(content))


FILES = {
    "missing bin": (lambda b, i: b.unlink(), "{b} does not exist"),
    "missing idx": (lambda b, i: i.unlink(), "{i} does not exist"),
    "empty bin": (lambda b, i: truncate(b, 0), "{b} is empty"),
    "empty idx": (lambda b, i: truncate(i, 0), "{i} is empty"),
    "truncated bin": (lambda b, i: truncate(b, 0.5), "{b} has 148 bytes where its index says 296"),
    "header cut": (lambda b, i: i.write_bytes(i.read_bytes()[:20]), "{i} is not a Megatron index"),
    "lengths cut": (lambda b, i: truncate(i, 0.5), "{i} is not a Megatron index"),
    "end cut": (lambda b, i: i.write_bytes(i.read_bytes()[:-1]), "{i} is not a Megatron index"),
    "other magic": (lambda b, i: damage(i, 0, b"X"), "wrong header"),
    "other version": (lambda b, i: damage(i, 9, b"\7"), "version 7"),
    "unknown type": (lambda b, i: damage(i, 17, b"\77"), "{i} is not a Megatron index"),
    "wrong count": (lambda b, i: damage(i, 18, b"\377" * 8), "{i} is not a Megatron index"),
    "wrong length": (lambda b, i: damage(i, 34, b"\1"), "lengths and positions differ"),
    "wrong position": (lambda b, i: damage(i, 34 + 3 * 4 + 8, b"\1"), "positions differ"),
    "last length": (lambda b, i: damage(i, 34 + 2 * 4, b"\1"), "{b} has 296 bytes where"),
}


@pytest.fixture
def files(tmp_path):
    prefix = tmp_path / "text"
    ranks.write_documents(prefix, [[5] * 30, [6] * 4, [7] * 40])
    return prefix


@pytest.mark.parametrize("case", FILES)
def test_damaged_files(case, files):
    data_files.check_data_files(([str(files)], None), None)
    change, message = FILES[case]
    paths = {"b": files.with_suffix(".bin"), "i": files.with_suffix(".idx")}
    change(*paths.values())
    for blend in [(([str(files)], None), None), (None, [None, ([str(files)], None), None])]:
        with pytest.raises(UserError) as caught:
            data_files.check_data_files(*blend)
        assert message.format(**paths) in str(caught.value)


def test_an_index_of_nothing(tmp_path):
    ranks.write_documents(tmp_path / "text", [])
    (tmp_path / "text.bin").write_bytes(b"1234")
    with pytest.raises(UserError, match="text.idx lists no documents"):
        data_files.check_data_files(([str(tmp_path / "text")], None), None)


def test_an_index_in_several_parts(tmp_path):
    """Lengths and positions are compared in parts of 2^20 documents."""
    count = (1 << 20) + 5
    start = 9 + 8 + 1 + 16
    ranks.write_documents(tmp_path / "text", [[1, 2]])
    idx = tmp_path / "text.idx"
    header = idx.read_bytes()[:18]
    arrays = [
        np.array([count, count + 1], np.int64),
        np.full(count, 2, np.int32),
        np.arange(count, dtype=np.int64) * 8,
        np.arange(count + 1, dtype=np.int64),
    ]
    idx.write_bytes(header + b"".join(array.tobytes() for array in arrays))
    assert data_files.indexed_bytes(str(idx)) == 8 * count
    damage(idx, start + 4 * count + 8 * (count - 2), b"\1")
    with pytest.raises(ValueError, match="positions differ"):
        data_files.indexed_bytes(str(idx))


def test_no_data():
    with pytest.raises(UserError, match="give --data-path"):
        data_files.check_data_files(None, None)


def test_documents_without_an_end_cannot_divide_rows(tmp_path):
    """Of two sequences, as Megatron's preprocessing splits sentences, the last one ends with it."""
    ended, cut = tmp_path / "ended", tmp_path / "cut"
    ranks.write_pairs(ended, ranks.random_pairs(20))
    ranks.write_documents(cut, [[5, ranks.EOD_ID, 6], [], [7]])
    blend = ([str(ended)], None)
    data_files.check_ends_of_documents(blend, None, ranks.EOD_ID)
    for wrong in (([str(ended), str(cut)], None), None), (None, [blend, ([str(cut)], None), None]):
        with pytest.raises(UserError, match=f"{cut}.bin ends with .* end of document, 119, which"):
            data_files.check_ends_of_documents(*wrong, ranks.EOD_ID)


# -- ends of documents, mask tokens and resumed runs


@pytest.mark.parametrize(
    "flags",
    [
        "--mdm-isolate-documents",
        "--mdm-rate-per document",
        "--no-mdm-eod-eligible",
        "--no-mdm-eod-attended",
        "--mdm-sft",
    ],
)
@pytest.mark.parametrize("eod", [None, -1])  # Hugging Face's and sentencepiece's answers
def test_flags_that_need_an_end_of_document(flags, eod, monkeypatch):
    monkeypatch.setattr(arguments, "get_tokenizer", lambda: SimpleNamespace(eod=eod))
    with pytest.raises(UserError, match=f"^{flags} needs an end-of-document token, and the token"):
        arguments._check_end_of_document(parsed(monkeypatch, *flags.split()))
    arguments._check_end_of_document(parsed(monkeypatch))


def mask_args(**values):
    return SimpleNamespace(
        mdm_mask_token_id=None, tokenizer_model="some.model", padded_vocab_size=128, **values
    )


def test_a_tokenizer_without_mask_piece(monkeypatch):
    pieces = SimpleNamespace(piece_to_id=lambda piece: 0, unk_id=lambda: 0)
    monkeypatch.setattr(arguments, "get_tokenizer", lambda: SimpleNamespace(tokenizer=pieces))
    with pytest.raises(UserError, match="some.model has no mask piece: give --mdm-mask-token-id"):
        arguments._mask_token_id(mask_args())


def test_a_mask_inside_the_padding_of_the_vocabulary():
    args = mask_args()
    args.mdm_mask_token_id = 127
    assert arguments._mask_token_id(args) == 127
    args.mdm_mask_token_id = 128
    with pytest.raises(UserError, match="--mdm-mask-token-id 128 lies outside the .* of 128"):
        arguments._mask_token_id(args)


@pytest.fixture
def tokenizer(monkeypatch):
    monkeypatch.setattr(
        arguments, "get_tokenizer", lambda: SimpleNamespace(eod=126, vocab_size=120)
    )


def finalize_args(args):
    # As Megatron's validation sets them.
    args.padded_vocab_size, args.ffn_hidden_size, args.kv_channels = 128, 64, 8
    return arguments.finalize_args(args)


def test_a_resumed_run_with_other_flags(base, monkeypatch, tokenizer):
    words = [*base[base.index("--load") : base.index("--finetune")], "--mdm-mask", "exact-count"]
    words += ["--mdm-eps", "0.01", "--seed", "7", "--no-mdm-eod-eligible"]
    with pytest.raises(UserError) as caught:
        finalize_args(parsed(monkeypatch, *words, data=base[:2]))
    message = str(caught.value)
    assert "--mdm-mask exact-count (checkpoint: bernoulli)" in message
    assert "--mdm-eps 0.01 (checkpoint: 0.001)" in message
    assert "--seed 7 (checkpoint: 1234)" in message
    assert "--mdm-eod-eligible False (checkpoint: True)" in message
    assert message.count("(checkpoint: ") == 4
    assert "add --mdm-allow-flag-change" in message

    for words_that_allow in (["--mdm-allow-flag-change"], ["--finetune"]):
        finalize_args(parsed(monkeypatch, *words, *words_that_allow, data=base[:2]))
    finalize_args(parsed(monkeypatch, *words[:2], data=base[:2]))
    with pytest.raises(UserError, match="--mock-data True .checkpoint: False.. Give its values"):
        finalize_args(parsed(monkeypatch, *words[:2]))


def test_a_pretrained_checkpoint_is_a_new_run_of_the_same_model(
    base, monkeypatch, tmp_path, tokenizer
):
    """Until --load has a checkpoint, which then is what the flags are compared with."""
    pretrained = base[base.index("--load") + 1]
    new = ["--pretrained-checkpoint", pretrained, "--load", str(tmp_path / "new")]

    def resolved(*words):
        return finalize_args(parsed(monkeypatch, *words, data=base[:2]))

    words = [*new, "--mdm-mask", "exact-count"]
    assert resolved(*words).finetune
    with pytest.raises(UserError) as caught:
        resolved(*words, "--rotary-base", "5000")
    assert str(caught.value).startswith(
        f"the checkpoint in {pretrained} is of another model: --rotary-base is 10000"
    )

    words = ["--pretrained-checkpoint", str(tmp_path / "gone"), "--load"]
    assert not resolved(*words, pretrained).finetune
    with pytest.raises(UserError, match="trained with other settings: --mdm-mask exact-count"):
        resolved(*words, pretrained, "--mdm-mask", "exact-count")
    with pytest.raises(UserError, match="^--pretrained-checkpoint .*gone has no checkpoint: give"):
        resolved(*words, str(tmp_path / "new"))
    # A first start of a run that can be started again has no checkpoint yet.
    gone = ["--load", str(tmp_path / "gone")]
    resolved(*gone, "--save", gone[1], "--save-interval", "1")
    with pytest.raises(UserError, match="^--load .*gone has no checkpoint: give the directory"):
        resolved(*gone)
    with pytest.raises(UserError, match="^--load .*gone has no checkpoint: give the directory"):
        resolved(*gone, "--finetune")


# -- the program


@pytest.mark.parametrize(
    "flags, drop, message",
    [
        ("--mdm-quantiles sobol", [], "argument --mdm-quantiles: invalid choice: 'sobol'"),
        ("--mdm-mask-token-id 128", [], "--mdm-mask-token-id 128 lies outside the vocabulary"),
        ("", ["--mdm-mask-token-id"], "the tokenizer NullTokenizer has no mask piece"),
        (
            "--tokenizer-type SentencePieceTokenizer --tokenizer-model missing.model",
            [],
            "--tokenizer-model missing.model does not exist: give the path of its file",
        ),
        (
            "--step-batch-size-schedule abc --eval-global-batch-size 8",
            ["--global-batch-size"],
            "Megatron rejects these flags or their files: Invalid schedule entry",
        ),
        ("--mdm-isad-token-ids 3 500", [], "--mdm-isad-token-ids 500 lies outside the vocabulary"),
        (FITTED, [], "cannot read the rate density x.json (No such file or directory): give"),
        ("--num-attention-heads 5", [], "Megatron rejects these flags or their files: "),
        (
            "--recompute-granularity selective --recompute-modules mla_up_proj",
            [],
            "Megatron rejects these flags or their files: mla_up_proj in recompute_modules is only",
        ),
        (
            "--mdm-rate-per document --data-path {short}",
            [],
            "no document at the beginning of {short}.bin ends with the tokenizer's end",
        ),
        (
            "--num-experts 4 --moe-layer-freq [0,1,1]",
            [],
            "Megatron rejects these flags or their files: Invalid length of moe_layer_pattern: 3",
        ),
        (
            "--num-experts 4 --moe-token-dispatcher-type flex",
            [],
            "Megatron rejects these flags or their files: DeepEP dispatcher requires TPxEP > 1",
        ),
        ("--data-path {files}", [], "{files}.bin has 148 bytes where its index says 296"),
        # Of which Megatron's writer of logs complains, on the last rank alone.
        (
            "--tensorboard-dir /proc/nowhere/logs",
            [],
            "--tensorboard-dir /proc/nowhere/logs cannot be written: No such file or directory",
        ),
        # Of 3 documents, 2 are for training, 1 for validation, none is left for the test.
        ("--data-path {short}", [], "the train split of {short} has 31 tokens, fewer than one row"),
        ("--data-path {short} --split 1,0,0", [], "--eval-iters 1 needs validation rows, and --sp"),
        ("--data-path {none}", [], "the test split of {none} has 0 tokens, fewer than one row"),
    ],
)
def test_mistakes_end_the_program(flags, drop, message, files, tmp_path):
    names = {name: str(tmp_path / name) for name in ("files", "short", "none")}
    ranks.write_documents(tmp_path / "files", [[5] * 30, [6] * 4, [7] * 40])
    truncate(tmp_path / "files.bin", 0.5)
    ranks.write_documents(tmp_path / "short", [[5] * 30, [6], [7] * 40])
    ranks.write_documents(tmp_path / "none", [[5] * 30, [6] * 4, [7] * 40])
    words = flags.format(**names).split()
    if "--data-path" not in words:
        words.append("--mock-data")
    if "--split" not in words:
        words += ["--split", "67,33,0" if "{none}" not in flags else "67,32,1"]
    words += ["--eval-iters", "1"]
    save = tmp_path / "checkpoint"
    run = ranks.launch(
        tmp_path / "run",
        1,
        *words,
        "--save",
        str(save),
        "--save-interval",
        "1",
        check=False,
        drop=drop,
    )
    assert run.status == [2]
    assert message.format(**names) in the_error_line(run.output)
    assert not list(tmp_path.rglob("checkpoint/*"))


def test_a_mistake_of_all_ranks_is_printed_once(tmp_path):
    run = ranks.launch(tmp_path, 2, "--data-path", str(tmp_path / "nothing"), check=False)
    assert run.status[0] == 2 and run.status[1] != 0
    assert "nothing.bin does not exist" in the_error_line(run.output)


# Documents of one row each, of which this one comes to rank 1 in the first step, in Megatron's
# order of rows.
ROW_OF_RANK_1 = 8


@pytest.mark.parametrize("workers", [0, 1])
def test_one_rank_fails_while_the_other_waits(workers, tmp_path):
    """Under torchrun itself: rank 1 reads a mask token, rank 0 waits for its gradients."""
    documents = [[5] * 32 for _ in range(40)]
    documents[ROW_OF_RANK_1][9] = ranks.MASK_ID
    ranks.write_documents(tmp_path / "text", documents)
    command = [
        *[sys.executable, *ranks.TORCHRUN],
        *["-m", "megatron_mdm.pretrain", *COMMON, "--split", "1,0,0", "--mdm-row-order", "run"],
        *["--data-path", str(tmp_path / "text"), "--num-workers", str(workers)],
        *["--save", str(tmp_path / "checkpoint"), "--save-interval", "1"],
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode != 0
    message = f"of the train data contains the mask token {ranks.MASK_ID} at position 9"
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith("error: rank 1: row "), run.stderr[-3000:]
    assert message in lines[0]
    # torchrun's report comes last, and shows the message of this rank.
    report = run.stderr[run.stderr.rindex("Root Cause") :]
    assert "rank      : 1 " in report and message in report
    assert not list(tmp_path.rglob("checkpoint/iter_*"))
