"""Every Megatron argument has a group, and a resumed run reports the arguments that changed."""

import sys
from argparse import ArgumentParser
from dataclasses import fields

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_mdm.config import MDMConfig, destination
from megatron_mdm.mcore.argument_groups import Group, flag_and_value, group, names
from megatron_mdm.mcore.flags.architecture import differences
from megatron_mdm.mcore.flags.arguments import add_arguments
from tests import ranks


@pytest.fixture
def parser(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain"])
    return add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))


def test_every_argument_stands_in_a_group(parser):
    """If a new Megatron version has a new argument, read it and put it into a group."""
    without = {action.dest for action in parser._actions if group(action.dest) is None}
    assert without == {"help"}
    dests = {action.dest for action in parser._actions}
    listed = {name for which in Group for name in names(which)}
    # Megatron itself adds these to the arguments.
    added = {"_is_global_batch_size_explicitly_specified", "rank", "world_size"}
    assert listed - dests <= {*added, "persist_layer_norm"}


def test_groups_name_flags_that_exist(parser):
    options = {option: action for action in parser._actions for option in action.option_strings}
    for which in (Group.MODEL, Group.DATA, Group.OBJECTIVE, Group.TRAINING):
        for name in names(which):
            flag, value = flag_and_value(name, True)
            assert options[flag].dest == name
            assert value is (type(options[flag]).__name__ != "_StoreFalseAction")


def test_settings_of_the_objective_are_compared():
    run = {f.name for f in fields(MDMConfig) if group(destination(f.name)) is Group.RUN}
    assert run == set(
        "device recipe head rate_bins ema_decay allow_flag_change overwrite_save checkpoint_hashes "
        "ppots_file vocab_size eval_block_sizes".split()
    )


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("rotary_interleaved", True, "--rotary-interleaved is True in the checkpoint and False in"),
        ("layernorm_epsilon", 1e-6, "--norm-epsilon is 1e-06 in the checkpoint and 1e-05 in"),
        ("add_bias_linear", True, "--disable-bias-linear is False in the checkpoint and True in"),
        ("moe_latent_size", 8, "--moe-latent-size is 8 in the checkpoint and None in"),
        ("softmax_type", "off-by-one", "--softmax-type is off-by-one in the checkpoint and van"),
    ],
)
def test_another_function_of_the_model_is_refused(name, value, text):
    given = {"add_bias_linear": False, "layernorm_epsilon": 1e-5, "rotary_interleaved": False}
    given |= {"moe_latent_size": None, "softmax_type": "vanilla"}
    assert not differences(given, given, "x")
    assert differences({**given, name: value}, given, "the flags").startswith(text)


def test_longer_rows_under_rotary_embeddings_are_the_same_model():
    saved = {"max_position_embeddings": 32, "position_embedding_type": "rope"}
    assert not differences(saved, {**saved, "max_position_embeddings": 64}, "the flags")
    saved["position_embedding_type"] = "learned_absolute"
    assert differences(saved, {**saved, "max_position_embeddings": 64}, "the flags")


# -- the program


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """Flags that resume a run after two iterations."""
    directory = str(tmp_path_factory.mktemp("saved") / "checkpoint")
    data = base[: base.index("--load")]
    ranks.launch(
        tmp_path_factory.mktemp("run"),
        1,
        *[*data, "--save", directory, "--save-interval", "2", "--exit-interval", "2"],
    )
    return [*data, "--load", directory]


def lines(run):
    return [line for line in run.output[0].splitlines() if "resumes with another" in line]


def test_a_forgotten_flag_of_training_is_told(saved, tmp_path):
    changed = ["--clip-grad", "0.5", "--adam-beta2", "0.95"]
    run = ranks.launch(
        tmp_path, 1, *saved, *changed, drop=["--attention-dropout", "--hidden-dropout"]
    )
    assert lines(run) == [
        "the run resumes with another --adam-beta2 0.95 (checkpoint: 0.999)",
        "the run resumes with another --attention-dropout 0.1 (checkpoint: 0.0)",
        "the run resumes with another --clip-grad 0.5 (checkpoint: 1.0)",
        "the run resumes with another --hidden-dropout 0.1 (checkpoint: 0.0)",
    ]


def test_nothing_is_told_of_the_same_run_in_another_layout(saved, tmp_path):
    layout = "--tensor-model-parallel-size 2 --log-interval 2 --micro-batch-size 4".split()
    assert not lines(ranks.launch(tmp_path, 2, *saved, *layout))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rotary-interleaved"], "another model: --rotary-interleaved is False in the check"),
        (["--split", "80,20,0"], "other settings: --split 80,20,0 (checkpoint: 90,10,0). Give"),
        (["--seed", "5"], "other settings: --seed 5 (checkpoint: 1234). Give its values, or add"),
    ],
)
def test_another_model_or_other_data_are_refused(flags, message, saved, tmp_path):
    run = ranks.launch(tmp_path, 1, *saved, *flags, check=False)
    assert run.status == [2] and message in run.output[0]


def test_changes_that_are_allowed_are_told(saved, tmp_path):
    run = ranks.launch(tmp_path, 1, *saved, "--split", "80,20,0", "--mdm-allow-flag-change")
    assert lines(run) == ["the run resumes with another --split 80,20,0 (checkpoint: 90,10,0)"]
