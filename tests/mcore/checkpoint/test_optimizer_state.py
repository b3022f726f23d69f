"""The optimizer's state is usable under other rates and layouts, or refused in one line."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.optimizer.optimizer import FP32Optimizer

from megatron_mdm.errors import UserError
from megatron_mdm.mcore.checkpoint import optimizer_state
from megatron_mdm.mcore.checkpoint.optimizer_state import check_optimizer_state, counterparts
from tests import ranks

# -- groups of parameters


def group(rate, decay=1.0, decoupled=False, **more):
    return {
        **{"max_lr": rate, "min_lr": 0.0, "wd_mult": decay, "lr_mult": 1.0},
        **{"is_expert_parallel": False, "is_decoupled_lr": False, "default_config": not decoupled},
        **more,
    }


def test_groups_whose_rates_have_changed_are_paired_by_kind():
    ours = [group(1e-4), group(1e-4, 0.0), group(1e-3, decoupled=True)]
    theirs = [group(5e-4, decoupled=True), group(7e-4, 0.0), group(7e-4)]
    assert counterparts(ours, theirs) == theirs[::-1]
    # The rates of the two kinds are swapped; pairing by value would give each the other's group.
    ours, theirs = (
        [group(1.0), group(2.0, decoupled=True)],
        [group(1.0, decoupled=True), group(2.0)],
    )
    assert counterparts(ours, theirs) == theirs[::-1]


def test_groups_of_one_kind_are_paired_by_their_rates():
    """A script's own overrides make such groups."""
    ours = [group(rate, decoupled=True) for rate in (1e-3, 2e-3)]
    assert counterparts(ours, ours[::-1]) == ours
    with pytest.raises(UserError, match="^the checkpoint's optimizer has other groups of param"):
        counterparts(ours, [group(rate, decoupled=True) for rate in (1e-3, 3e-3)])


@pytest.mark.parametrize(
    "theirs",
    [
        [group(1e-3)],
        [group(1e-3), group(1e-3, 0.0), group(1e-3, decoupled=True)],
        [group(1e-3), group(1e-3, decoupled=True)],
    ],
)
def test_other_groups(theirs):
    with pytest.raises(UserError, match=r"\(\d, this run 2\): give --decoupled-lr"):
        counterparts([group(1e-3), group(1e-3, 0.0)], theirs)


@pytest.mark.parametrize("keeps_rates", [False, True])
def test_settings_are_those_of_the_run(keeps_rates, monkeypatch):
    loaded = {}
    monkeypatch.setattr(FP32Optimizer, "load_state_dict", lambda _, state: loaded.update(state))
    ours = group(1e-4, betas=(0.9, 0.95), params=["a"], lr=0.0)
    theirs = group(3e-4, betas=(0.9, 0.999), params=[0], lr=2e-4, step=7)
    args = Namespace(use_checkpoint_opt_param_scheduler=keeps_rates)
    optimizer = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[ours]))
    with optimizer_state.settings_may_differ(args):
        FP32Optimizer.load_state_dict(optimizer, {"param_groups": [theirs]})
    rate = 3e-4 if keeps_rates else 1e-4
    expected = group(rate, betas=(0.9, 0.95), params=[0], lr=2e-4, step=7)
    assert loaded == {"param_groups": [expected]}
    assert ours["max_lr"] == rate and ours["params"] == ["a"]


# -- flags


def state_of(**values):
    defaults = {
        "load": "there",
        "ckpt_format": "torch_dist",
        "optimizer": "adam",
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "decoupled_lr": None,
        "num_experts": None,
        "mdm_model": "gpt",
        **dict.fromkeys(("finetune", "no_load_optim", "skip_train", "bf16", "fp16"), False),
        "use_distributed_optimizer": False,
    }
    return {**defaults, **values}


@pytest.mark.parametrize(
    "now, saved, message",
    [
        ({"optimizer": "sgd"}, {}, "of another kind: --optimizer sgd (checkpoint: adam)"),
        ({}, {"bf16": True}, "of another kind: --bf16 False (checkpoint: True). Give these"),
        ({"fp16": True}, {}, "of another kind: --fp16 True (checkpoint: False)"),
        ({"fp16": True}, {"bf16": True}, None),
        (
            {"use_distributed_optimizer": True},
            {"use_distributed_optimizer": False},
            "--use-distributed-optimizer True (checkpoint: False)",
        ),
        ({"decoupled_lr": 1e-3}, {}, "--decoupled-lr 0.001 (checkpoint: None)"),
        ({"decoupled_lr": 1e-3}, {"decoupled_lr": 2e-3}, None),
        ({"tensor_model_parallel_size": 1}, {}, None),  # the checkpoint holds whole tensors
        ({"no_load_optim": True}, {"bf16": True}, None),
        ({"finetune": True}, {"bf16": True}, None),
        ({"load": None}, {"bf16": True}, None),
        ({}, {"bf16": True, "no_save_optim": True}, None),
    ],
)
def test_states_of_another_kind(now, saved, message):
    args, there = Namespace(**state_of(**now)), state_of(**saved)
    if message is None:
        check_optimizer_state(args, there)
        return
    with pytest.raises(UserError) as caught:
        check_optimizer_state(args, there)
    assert message in str(caught.value) and "add --no-load-optim" in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        *({"tensor_model_parallel_size": 1}, {"bf16": True}, {"pipeline_model_parallel_size": 2}),
        {"mdm_model": "hybrid"},
    ],
)
def test_what_the_distributed_optimizer_saves(changed):
    distributed = {"use_distributed_optimizer": True}
    args, saved = Namespace(**state_of(**distributed, **changed)), state_of(**distributed)
    with pytest.raises(UserError) as caught:
        check_optimizer_state(args, saved)
    message = str(caught.value)
    assert "fits only the layout that saved it: --" in message and "(checkpoint: " in message
    assert "to which --dist-ckpt-optim-fully-reshardable may be added" in message
    check_optimizer_state(args, {**saved, "dist_ckpt_optim_fully_reshardable": True})


# -- runs

RATES = "--lr 1e-2 --min-lr 1e-3 --decoupled-lr 5e-3 --weight-decay 0.1 --adam-beta2 0.95".split()
OTHER = "--lr 2e-3 --min-lr 1e-4 --decoupled-lr 3e-2 --weight-decay 0.3 --adam-beta2 0.8".split()
# One parameter of each group: with the common rate, with the decoupled rate, and without weight
# decay.
HIDDEN = "decoder.layers.mlp.linear_fc2.weight"
EMBEDDING = "embedding.word_embeddings.weight"
NORM = "decoder.final_layernorm.weight"


@pytest.fixture(scope="module")
def rates(base, tmp_path_factory):
    """A run of two steps: its directory, and the flags that resume it."""
    directory = tmp_path_factory.mktemp("rates")
    flags = [*base[: base.index("--load")], "--save", str(directory / "checkpoint")]
    flags += ["--save-interval", "1"]
    ranks.launch(directory / "two", 1, *flags, *RATES, "--train-iters", "2")
    return directory, [*flags, "--load", str(directory / "checkpoint")]


def state(directory, iteration):
    """Weights and Adam's moving averages of three parameters, by (kind, name)."""
    reader = dcp.FileSystemReader(directory / "checkpoint" / f"iter_{iteration:07d}")
    metadata = reader.read_metadata().state_dict_metadata
    prefixes = {"w": "", "m": "optimizer.state.exp_avg.", "v": "optimizer.state.exp_avg_sq."}
    keys = {(k, n): p + n for k, p in prefixes.items() for n in (HIDDEN, EMBEDDING, NORM)}
    tensors = {key: torch.empty(metadata[name].size) for key, name in keys.items()}
    dcp.load({keys[key]: x for key, x in tensors.items()}, storage_reader=reader, no_dist=True)
    return {key: x.double() for key, x in tensors.items()}


def test_a_step_at_other_rates(rates):
    """The third step is Adam's, with the new rates of every group, from the saved averages."""
    directory, flags = rates
    more = ["--override-opt_param-scheduler", "--train-iters", "3"]
    run = ranks.launch(directory / "third", 1, *flags, *OTHER, *more)
    assert run.scalars["learning-rate"] == pytest.approx([2e-3])
    assert "another --adam-beta2 0.8 (checkpoint: 0.95)" in run.output[0]
    before, after = state(directory, 2), state(directory, 3)
    b1, b2, eps = 0.9, 0.8, 1e-8
    for name, lr, decay in ((HIDDEN, 2e-3, 0.3), (EMBEDDING, 3e-2, 0.3), (NORM, 2e-3, 0.0)):
        gradient = (after["m", name] - b1 * before["m", name]) / (1 - b1)
        squares = b2 * before["v", name] + (1 - b2) * gradient**2
        torch.testing.assert_close(after["v", name], squares, rtol=1e-4, atol=1e-12)
        step = after["m", name] / (1 - b1**3)
        step /= (after["v", name] / (1 - b2**3)).sqrt() + eps
        expected = before["w", name] * (1 - lr * decay) - lr * step
        torch.testing.assert_close(after["w", name], expected, rtol=1e-5, atol=1e-7, msg=name)


def test_the_rates_of_the_checkpoint(rates):
    directory, flags = rates
    more = ["--use-checkpoint-opt_param-scheduler", "--train-iters", "3", "--ckpt-step", "2"]
    run = ranks.launch(directory / "kept", 1, *flags, *OTHER, *more)
    assert run.scalars["learning-rate"] == pytest.approx([1e-2])


def test_other_rates_without_a_word(rates):
    directory, flags = rates
    run = ranks.launch(directory / "refused", 1, *flags, *OTHER, *["--ckpt-step", "2"], check=False)
    assert run.status == [2]
    line = ranks.the_error_line(run.output)
    assert "the checkpoint's schedule has another learning rate: 0.01, here 0.002" in line
    assert "add --override-opt_param-scheduler" in line


def test_the_way_to_another_layout(base, tmp_path):
    """The remedy in the error line works: one step with the flag, and then any layout."""
    save = ["--save", str(tmp_path / "checkpoint"), "--save-interval", "1"]
    flags = [*base, *save, "--use-distributed-optimizer"]
    two = ["--tensor-model-parallel-size", "2"]
    fits = ["--dist-ckpt-optim-fully-reshardable"]
    whole = ranks.launch(tmp_path / "whole", 1, *base)
    runs = [ranks.launch(tmp_path / "first", 2, *flags, *two, "--exit-interval", "2")]
    refused = ranks.launch(tmp_path / "refused", 2, *flags, check=False)
    assert "--tensor-model-parallel-size 1 (checkpoint: 2)" in ranks.the_error_line(refused.output)
    # One bucket holds the whole model, also with overlapped communication, unless the bucket size
    # is small.
    reads = [*base[: base.index("--load")], "--load", save[1], "--use-distributed-optimizer", *two]
    reads += ["--overlap-grad-reduce", "--exit-interval", "3"]
    ranks.launch(tmp_path / "one bucket", 2, *reads)
    small = ["--ddp-bucket-size", "2000"]
    refused = ranks.launch(tmp_path / "buckets", 2, *reads, *small, check=False)
    lines = [x for x in refused.output[0].splitlines() if x.startswith("error: ")]
    assert len(lines) == 1 and "is in other buckets than this run's" in lines[0]
    assert "--dist-ckpt-optim-fully-reshardable may be added" in lines[0]
    runs += [ranks.launch(tmp_path / "second", 2, *flags, *two, *fits, "--exit-interval", "3")]
    runs += [ranks.launch(tmp_path / "third", 2, *flags, *fits)]
    losses = [loss for run in runs for loss in run.losses]
    assert len(losses) == 5 and losses == pytest.approx(whole.losses, rel=1e-5)


def test_generators_of_ranks_that_did_not_exist(rates, tmp_path):
    """With --data-parallel-random-init, Megatron reads a state for each data-parallel rank."""
    _, flags = rates
    own = [*flags[: flags.index("--save")], "--data-parallel-random-init", "--lr", "1e-2"]
    own += ["--save", str(tmp_path / "checkpoint"), "--save-interval", "1"]
    ranks.launch(tmp_path / "one", 1, *own, "--exit-interval", "1")
    load = ["--load", str(tmp_path / "checkpoint")]
    run = ranks.launch(tmp_path / "two", 2, *own, *load, check=False)
    line = next(line for line in run.output[1].splitlines() if line.startswith("error: "))
    assert line.startswith(
        "error: rank 1: the states of the random-number generators in the checkpoint cannot be "
        "read here (IndexError: list index out of range): add --no-load-rng"
    )
    ranks.launch(tmp_path / "again", 2, *own, *load, "--no-load-rng")
