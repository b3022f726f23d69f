"""FP8 without a GPU: refused flags, and evaluations that leave delayed scaling alone."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.training import get_args
from megatron.training.arguments import parse_args

from megatron_mdm.config import MDMConfig
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.device import training_device
from megatron_mdm.mcore.flags import arguments
from megatron_mdm.mcore.flags.fp8 import check_scales
from megatron_mdm.mcore.model import masked_head
from megatron_mdm.mcore.model.fp8 import ignore_fp8_state_on_load, keep_scales_in_evaluation
from tests import HAS_TRANSFORMER_ENGINE, ranks

FP8 = "--mdm-device cuda --bf16 --transformer-impl transformer_engine --fp8-format hybrid".split()
transformer_engine = pytest.mark.skipif(
    not HAS_TRANSFORMER_ENGINE, reason="Transformer Engine is not installed (extra `gpu`)"
)


@pytest.fixture
def check(monkeypatch):
    """Checks flags on a machine with Transformer Engine and a GPU of this capability."""

    def run(*flags, capability=(9, 0), cuda="13.0"):
        argv = [*ranks.MODEL, *ranks.TOKENIZER, *ranks.TRAINING, "--mock-data", *flags]
        monkeypatch.setattr(sys, "argv", ["pretrain", *argv])
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        arguments.validate_flags(parse_args(arguments._quiet_parser))

    return run


@pytest.mark.parametrize(
    "flags, capability, message",
    [
        ("--mdm-device cpu", (9, 0), "--fp8-format needs a GPU: leave it out"),
        ("--transformer-impl local", (9, 0), "use --transformer-impl transformer_engine, or"),
        ("", (8, 0), "needs a GPU of compute capability 8.9, this one has 8.0: use --bf16 alone"),
        ("--fp8-recipe blockwise", (8, 9), "capability 9.0, .* or --fp8-recipe delayed"),
        ("--fp8-recipe mxfp8", (9, 0), "--fp8-recipe mxfp8 needs .* capability 10.0"),
        ("--fp8-recipe mxfp8", (12, 0), "10.0, below 12.0, this one has 12.0: .* or --fp8-rec"),
        ("--micro-batch-size 1 --seq-length 24", (9, 0), "--seq-length must be a multiple of 16"),
        ("--hidden-size 40", (9, 0), "--hidden-size must be .* 16, got 40"),
        ("--ffn-hidden-size 88", (9, 0), "--ffn-hidden-size must be .* 16, got 88"),
        ("--use-transformer-engine-op-fuser", (9, 0), "op-fuser keeps the scales .* leave it out"),
        ("--kv-channels 6", (9, 0), "--num-attention-heads x --kv-channels must be .*, got 24"),
        (
            "--num-experts 4 --moe-ffn-hidden-size 24",
            (9, 0),
            "--moe-ffn-hidden-size must be a multiple of 16, got 24",
        ),
        (
            "--tensor-model-parallel-size 2 --ffn-hidden-size 80",
            (9, 0),
            r"--ffn-hidden-size must be a multiple of 32 \(16 for each of 2 ranks\), got 80",
        ),
        (
            "--tensor-model-parallel-size 4 --sequence-parallel --num-experts 4 "
            "--moe-ffn-hidden-size 48 --expert-tensor-parallel-size 2 --hidden-size 64",
            (9, 0),
            "--moe-ffn-hidden-size must be a multiple of 32 .* got 48",
        ),
        (
            "--context-parallel-size 4 --micro-batch-size 1 --global-batch-size 8",
            (9, 0),
            "--seq-length must be a multiple of 64 .* got 32",
        ),
        (
            "--tensor-model-parallel-size 4 --sequence-parallel --micro-batch-size 1 "
            "--hidden-size 64",
            (9, 0),
            "--seq-length must be a multiple of 64 .* got 32",
        ),
    ],
)
def test_what_cannot_compute_in_fp8_is_refused(flags, capability, message, check):
    with pytest.raises(UserError, match=message) as caught:
        check(*FP8, *flags.split(), capability=capability)
    assert "\n" not in str(caught.value)


def test_blockwise_scales_need_a_newer_cuda(check):
    flags = [*FP8, "--fp8-recipe", "blockwise"]
    with pytest.raises(UserError, match="needs CUDA 12.9, this torch has 12.8.* or --fp8-recipe d"):
        check(*flags, cuda="12.8")
    check(*flags, cuda="12.9")


def test_rows_of_the_masked_head_suit_fp8_products():
    """MXFP8 takes multiples of 32; test_masked_head.py shows that rows have this multiple."""
    assert masked_head.ROW_MULTIPLE % 32 == 0


@pytest.mark.parametrize(
    "recipe, capability",
    [("delayed", (8, 9)), ("tensorwise", (8, 9)), ("blockwise", (9, 0)), ("mxfp8", (10, 0))],
)
def test_what_can_is_not(recipe, capability, check):
    check(*FP8, "--fp8-recipe", recipe, capability=capability)
    check(*FP8[:-2], capability=(7, 0))  # without FP8 any device will do


class Layer(torch.nn.Module):
    """A layer that changes its state as Transformer Engine's do, with the kernel in torch."""

    def __init__(self):
        super().__init__()
        self.fp8_meta = {}

    def forward(self, x):
        if not self.fp8_meta:
            state = SimpleNamespace(scale=torch.ones(3), amax_history=torch.zeros(4, 3))
            self.fp8_meta["scaling_fwd"] = state
        state = self.fp8_meta["scaling_fwd"]
        state.amax_history[0].clamp_(min=float(x.abs().max()))
        if torch.is_grad_enabled():
            state.scale.copy_(448.0 / state.amax_history.amax(dim=0))
            state.amax_history.copy_(state.amax_history.roll(-1, dims=0))
            state.amax_history[0].zero_()
        if x.isnan().any():
            raise FloatingPointError
        return x


@pytest.mark.parametrize("keeps", [True, False])
def test_evaluations_leave_the_state_of_delayed_scaling_alone(keeps):
    def trained(evaluates):
        model = torch.nn.Sequential(Layer(), torch.nn.Linear(2, 2), Layer())
        if keeps:
            keep_scales_in_evaluation(model)
        for step in range(4):
            if evaluates:
                model.eval()
                with torch.no_grad():
                    model(torch.full((2, 2), 100.0 + step))
                with pytest.raises(FloatingPointError), torch.no_grad():
                    model(torch.full((2, 2), torch.nan))
                model.train()
            model(torch.full((2, 2), 1.0 + step))
        states = [model[i].fp8_meta["scaling_fwd"] for i in (0, 2)]
        return torch.stack([torch.cat([s.scale[None], s.amax_history]) for s in states])

    torch.manual_seed(0)
    plain = trained(False)
    torch.manual_seed(0)
    assert torch.equal(trained(True), plain) == keeps


def test_scales_of_a_checkpoint_are_read_with_consent(monkeypatch):
    monkeypatch.delenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", raising=False)
    saved = {"fp8": "hybrid", "fp8_recipe": "delayed"}
    args = SimpleNamespace(**saved)
    with pytest.raises(UserError, match="in here has scales .* set NVTE_ALLOW_UNSAFE_.*=1 in"):
        check_scales(args, saved, "here")
    for other in ({}, {"fp8": None, "fp8_recipe": "delayed"}, saved | {"fp8_recipe": "tensorwise"}):
        check_scales(args, other, "here")
        check_scales(SimpleNamespace(**{"fp8": None, **other}), saved, "here")
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    check_scales(args, saved, "here")


class Stateful(torch.nn.Linear):
    """A layer that refuses a state, as Transformer Engine refuses a pickled one."""

    def get_extra_state(self):
        return torch.ones(3, dtype=torch.uint8)

    def set_extra_state(self, state):
        if state is not None:
            raise RuntimeError("refused")


def test_models_without_delayed_scaling_leave_scales_alone():
    state = torch.nn.Sequential(Stateful(2, 2), torch.nn.Linear(2, 2)).state_dict()
    model = torch.nn.Sequential(Stateful(2, 2), torch.nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="refused"):
        model.load_state_dict(state)
    ignore_fp8_state_on_load(model)
    model.load_state_dict(state)
    assert torch.equal(model[0].weight, state["0.weight"])


def fp8_flags() -> None:
    """Parses flags as the program does, and saves Transformer Engine's recipe for them."""
    from megatron.core.fp8_utils import get_fp8_recipe

    from megatron_mdm.mcore.flags.arguments import parse
    from megatron_mdm.mcore.model.builder import model_config

    with training_device("cpu"):
        args = parse()
        config = model_config(args, MDMConfig.from_args(args)).transformer
        recipe = get_fp8_recipe(config)
    names = ("fp8", "fp8_recipe", "fp8_amax_history_len", "fp8_amax_compute_algo")
    delayed = ("amax_history_len", "amax_compute_algo", "margin")
    seen = {
        "config": [getattr(config, name) for name in names],
        "recipe": type(recipe).__name__,
        "history": [getattr(recipe, name, None) for name in delayed],
        "accumulates in products": [x.gradient_accumulation_fusion for x in (get_args(), config)],
    }
    Path(os.environ["TRACE_DIR"], "flags.json").write_text(json.dumps(seen))


def delayed_scaling() -> None:
    """Saves scales of Transformer Engine's own state after steps with evaluations between them.

    Its layer, state, autocast and update are real. The GPU kernel's part, to record the largest
    entry of a tensor, is done here.
    """
    os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"  # the update in torch
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    from megatron_mdm.mcore.model.fp8 import ignore_fp8_state_on_load, keep_scales_in_evaluation

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = te.Linear(16, 16, device="cpu")

        def forward(self, largest):
            recipe = DelayedScaling(amax_history_len=4, amax_compute_algo="max")
            with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
                self.layer.init_fp8_metadata()
                FP8GlobalStateManager.add_fp8_tensors_to_global_buffer(self.layer.fp8_meta)
                self.layer.fp8_meta["scaling_fwd"].amax_history[0].clamp_(min=largest)

    def scales(keeps, evaluates):
        FP8GlobalStateManager.reset()
        model, seen = Model(), []
        if keeps:
            keep_scales_in_evaluation(model)
        for number in range(4):
            if evaluates:
                with torch.no_grad():
                    model.eval()(100.0 + number)
            model.train()(1.0 + number)
            seen.append(model.layer.fp8_meta["scaling_fwd"].scale.tolist())
        return seen

    def loaded_without_fp8():
        trained = Model()
        trained(1.0)
        state = trained.state_dict()
        assert state["layer._extra_state"].numel()
        model = Model()
        ignore_fp8_state_on_load(model)
        model.load_state_dict(state)
        return torch.equal(model.layer.weight, trained.layer.weight)

    with training_device("cpu"):
        found = {
            "without evaluation": scales(True, False),
            "kept": scales(True, True),
            "not kept": scales(False, True),
            "loaded without FP8": loaded_without_fp8(),
        }
    Path(os.environ["TRACE_DIR"], "scales.json").write_text(json.dumps(found))


@transformer_engine
def test_the_state_of_transformer_engine_itself(tmp_path):
    ranks.launch(tmp_path, 1, entry=delayed_scaling, transformer_engine=True)
    scales = json.loads((tmp_path / "scales.json").read_text())
    assert scales["kept"] == scales["without evaluation"]
    assert scales["not kept"] != scales["without evaluation"]
    assert scales["loaded without FP8"]


@transformer_engine
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_flags_reach_megatron_and_transformer_engine(recipe, tmp_path):
    flags = [*FP8, "--fp8-recipe", recipe, "--mock-data"]
    flags += "--fp8-amax-history-len 1024 --fp8-amax-compute-algo max".split()
    ranks.launch(tmp_path, 1, *flags, entry=fp8_flags, transformer_engine=True)
    seen = json.loads((tmp_path / "flags.json").read_text())
    assert seen["config"] == ["hybrid", recipe, 1024, "max"]
    kinds = {"tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling"}
    assert seen["recipe"] == kinds.get(recipe, "TEDelayedScaling")
    # To accumulate gradients in products, Megatron's own layers need apex and Transformer Engine's
    # do not.
    apex = find_spec("fused_weight_gradient_mlp_cuda") is not None
    assert seen["accumulates in products"] == [True, apex]
    if recipe == "delayed":
        assert seen["history"] == [1024, "max", 0]
