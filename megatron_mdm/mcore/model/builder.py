"""Builds the model: Megatron's GPTModel or, with --mdm-model hybrid, its HybridModel.

Megatron marks GPTModel as deprecated in favour of HybridModel. HybridModel loads GPTModel's
checkpoints.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

from megatron_mdm.config import MDMConfig
from megatron_mdm.errors import UserError
from megatron_mdm.libraries import ACCUMULATES_GRADIENTS
from megatron_mdm.mcore.flags.arguments import megatron_errors_as_user_errors
from megatron_mdm.mcore.flags.start import check_same_start
from megatron_mdm.mcore.model.fp8 import ignore_fp8_state_on_load, keep_scales_in_evaluation
from megatron_mdm.mcore.model.hybrid import HybridModelWithHead, bidirectional_stack
from megatron_mdm.mcore.model.layer_specs import bidirectional_spec, drop_norm_extra_state
from megatron_mdm.mcore.model.routers import router_loss_scale, use_short_row_routers
from megatron_mdm.mcore.model.vocabulary_padding import mask_padded_vocabulary
from megatron_mdm.mcore.ranks import equal_on_all_ranks
from megatron_mdm.objective.ppots.fit_file import load_sampler


@dataclass(frozen=True)
class TrainingHooks:
    """Functions that training adds to the model. The model code does not import training code.

    They must be plain functions. Megatron deep-copies its configuration: copies share a plain
    function, but would copy the object behind a bound method or a `partial`. `dataclasses.replace`
    loses the functions, and a configuration that holds them cannot be pickled. Change Megatron's
    arguments before `model_config`, or change the configuration in place.

    Attributes:
        after_gradients: replaces Megatron's `finalize_model_grads`.
        before_model: called once, after Megatron is initialised and before any stage is built.
        modules: returns the modules that a stage holds beside the weights, by attribute name. Its
            arguments are Megatron's transformer configuration and the virtual pipeline stage.
        positions_per_token: returns the argument of `router_loss_scale` for the current iteration.
    """

    after_gradients: Callable[..., None]
    before_model: Callable[[], None]
    modules: Callable[[Any, int | None], Mapping[str, torch.nn.Module]]
    positions_per_token: Callable[[], float]


class MDMBuilder(GPTModelBuilder):
    """Megatron's GPTModel builder; `_finish_stage` adapts each stage that it builds.

    Local layers and Transformer Engine's layers then have the same keys in checkpoints, evaluations
    leave FP8 scales unchanged, and stages hold the modules of `TrainingHooks`.
    """

    def build_distributed_models(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Builds the stages of this rank."""
        self._model_config.before_model()
        return super().build_distributed_models(*args, **kwargs)

    def build_model(self, *args: Any, vp_stage: int | None = None, **kwargs: Any) -> GPTModel:
        """Builds one stage."""
        with megatron_errors_as_user_errors():
            model = super().build_model(*args, vp_stage=vp_stage, **kwargs)
        return self._model_config.finish_stage(model, vp_stage)


class MDMHybridBuilder(HybridModelBuilder):
    """The same for HybridModel. Megatron's builder fixes the class, so `build_model` changes it."""

    def build_distributed_models(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Builds the stages of this rank."""
        self._model_config.before_model()
        return super().build_distributed_models(*args, **kwargs)

    def build_model(self, *args: Any, vp_stage: int | None = None, **kwargs: Any) -> HybridModel:
        """Builds one stage."""
        with megatron_errors_as_user_errors():
            model = super().build_model(*args, vp_stage=vp_stage, **kwargs)
        model.__class__ = HybridModelWithHead
        return self._model_config.finish_stage(model, vp_stage)


def _finish_stage(
    model: Any, vp_stage: int | None, args: Namespace, mdm: MDMConfig, hooks: TrainingHooks | None
) -> Any:
    drop_norm_extra_state(model)
    if args.mdm_vocab_size < args.padded_vocab_size:
        mask_padded_vocabulary(model, args.mdm_vocab_size)
    if args.gradient_accumulation_fusion:
        accumulate_in_place(model)
    if mdm.random_length_fraction:
        use_short_row_routers(model)
    if model.config.fp8:
        keep_scales_in_evaluation(model)
    if not (model.config.fp8 and model.config.fp8_recipe == "delayed"):
        ignore_fp8_state_on_load(model)
    if hooks is not None:
        for name, module in hooks.modules(model.config, vp_stage).items():
            setattr(model, name, module)
    return model


def accumulate_in_place(model: torch.nn.Module) -> None:
    """Turns on gradient accumulation fusion in Transformer Engine's layers.

    The matrix product of a weight gradient then adds its result to Megatron's float32 gradient
    buffer, without a separate tensor and a separate addition. Megatron has one switch for
    Transformer Engine's layers and its own. With the switch, its output layer needs apex, which
    Transformer Engine's layers do not need. Without apex `model_config` therefore builds with the
    switch off, and this function sets the attribute in Transformer Engine's layers only. The
    gradient of the output layer then goes through autograd.

    Args:
        model: model with layers of either implementation.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _check_ranks_agree(args: Namespace, mdm: MDMConfig) -> None:
    """Compares the contents that ranks have read from files, which may be on different disks.

    It must run before the first stage is built: ranks with several stages exchange tied embeddings
    while they build them, at different times.

    Raises:
        SharedError: ranks would start from different checkpoints.
        UserError: ranks have different P-POTS files, so stages would mask the same row differently.
    """
    check_same_start(args)
    path = mdm.ppots_file
    if path and not equal_on_all_ranks(load_sampler(path).sampler().digest()):
        raise UserError(
            f"--mdm-ppots-file {path} is not the same file on all nodes: copy one file to all of "
            "them"
        )


def _missing(*_: Any) -> NoReturn:
    """Default of the hooks below: an error for a configuration that has lost its hooks.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "this model configuration has no hooks of the objective: dataclasses.replace and "
        "serialization lose them. Take the one that build_objective or model_config returned"
    )


class _BuilderHooks:
    """Hooks that `model_config` sets; no dataclass fields, which Megatron would copy and save."""

    before_model: Callable[[], None] = _missing
    finish_stage: Callable[[Any, int | None], Any] = _missing


@dataclass(kw_only=True)
class MDMModelConfig(_BuilderHooks, GPTModelConfig):
    """Megatron's GPTModel configuration, whose `builder` names `MDMBuilder`."""

    builder: ClassVar[str] = f"{__name__}.MDMBuilder"


@dataclass(kw_only=True)
class MDMHybridModelConfig(_BuilderHooks, HybridModelConfig):
    """Megatron's HybridModel configuration, whose `builder` names `MDMHybridBuilder`."""

    builder: ClassVar[str] = f"{__name__}.MDMHybridBuilder"


def model_config(
    args: Namespace, mdm: MDMConfig, hooks: TrainingHooks | None = None
) -> MDMModelConfig | MDMHybridModelConfig:
    """Megatron's model configuration with bidirectional attention.

    Args:
        args: parsed and resolved arguments (mcore/flags/arguments.py).
        mdm: settings of the objective.
        hooks: hooks of training; None: the model is not trained.
    """
    fused = args.gradient_accumulation_fusion and ACCUMULATES_GRADIENTS.is_installed()
    flags = Namespace(**vars(args) | {"gradient_accumulation_fusion": fused})
    config: Any
    if args.hybrid_layer_pattern:
        config = hybrid_config_from_args(flags, model_config_cls=MDMHybridModelConfig)
        config.hybrid_stack_spec = bidirectional_stack(config.transformer, mdm)
    else:
        config = gpt_config_from_args(flags, model_config_cls=MDMModelConfig)
        # Megatron parses --rope-scaling-factor, but gpt_config_from_args leaves it at 8.
        config.rope_scaling_factor = args.rope_scaling_factor
        config.transformer_layer_spec = partial(_layer_spec, mdm=mdm)

    # Plain functions, because Megatron's copies of its configuration share them (`TrainingHooks`).
    def before_model() -> None:
        _check_ranks_agree(args, mdm)
        if hooks is not None:
            hooks.before_model()

    def finish_stage(model: Any, vp_stage: int | None) -> Any:
        return _finish_stage(model, vp_stage, args, mdm, hooks)

    def router_scale() -> torch.Tensor:
        positions = 1.0 if hooks is None else hooks.positions_per_token()
        return router_loss_scale(config.transformer, args.seq_length, mdm.normalization, positions)

    config.before_model, config.finish_stage = before_model, finish_stage
    config.transformer.moe_grad_scale_func = router_scale
    if hooks is not None:
        config.transformer.finalize_model_grads_func = hooks.after_gradients
    return config


def _layer_spec(config: GPTModelConfig, vp_stage: int | None = None, *, mdm: MDMConfig) -> Any:
    return bidirectional_spec(config, mdm, vp_stage)
