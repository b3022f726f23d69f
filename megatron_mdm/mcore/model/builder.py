"""The model: Megatron's GPTModel or, with --hybrid-layer-pattern, its HybridModel.

Megatron marks GPTModel as deprecated in favour of HybridModel, into which its checkpoints load.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, ClassVar, NoReturn

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

from megatron_mdm.config import MDMConfig
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.flags.arguments import ACCUMULATES_GRADIENTS, megatron_errors_as_user_errors
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
    """What training adds to the model, which itself knows nothing of training.

    Plain functions: of a bound method or a `partial` Megatron's copies of its configuration would
    copy the object too. Copies by `copy.deepcopy` share them. `dataclasses.replace` loses them, and
    a configuration that has them cannot be pickled: change it before `model_config`, or in place.

    Attributes:
        after_gradients: in the place of Megatron's `finalize_model_grads`.
        before_model: called once, when Megatron is initialised and no stage is built.
        modules: the modules beside the weights that a stage has, by attribute; its arguments are
            Megatron's transformer configuration and the virtual pipeline stage.
    """

    after_gradients: Callable[..., None]
    before_model: Callable[[], None]
    modules: Callable[[Any, int | None], Mapping[str, torch.nn.Module]]


class MDMBuilder(GPTModelBuilder):
    """Megatron's builder, with what training has beside the weights.

    Checkpoints of local and of Transformer Engine's layers have the same keys, and evaluations
    leave FP8 scales as they are.
    """

    def build_distributed_models(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Builds the stages of a rank."""
        self._model_config.before_model()
        return super().build_distributed_models(*args, **kwargs)

    def build_model(self, *args: Any, vp_stage: int | None = None, **kwargs: Any) -> GPTModel:
        """Builds one stage."""
        with megatron_errors_as_user_errors():
            model = super().build_model(*args, vp_stage=vp_stage, **kwargs)
        return self._model_config.finish_stage(model, vp_stage)


class MDMHybridBuilder(HybridModelBuilder):
    """The same for HybridModel, whose class Megatron's builder fixes."""

    def build_distributed_models(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Builds the stages of a rank."""
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
    """Makes Transformer Engine's layers add gradients of weights to the sum that Megatron keeps.

    The product that makes a gradient then accumulates in float32 itself, with no tensor and no
    addition of its own. Megatron has one switch for these layers and its own, and will not build
    the output layer with it where apex is missing, which the others do not need. So `model_config`
    builds without, and this sets what the switch sets in Transformer Engine's layers; the output
    layer's gradient goes the ordinary way, through autograd.

    Args:
        model: with layers of either implementation.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _check_ranks_agree(args: Namespace, mdm: MDMConfig) -> None:
    """Compares what ranks have read from files, which may lie on different disks.

    Before the first stage is built: ranks with several stages exchange tied embeddings while they
    build them, at times of their own.

    Raises:
        SharedError: they would start from different checkpoints.
        UserError: stages would mask the same row differently.
    """
    check_same_start(args)
    path = mdm.ppots_file
    if path and not equal_on_all_ranks(load_sampler(path).sampler().digest()):
        raise UserError(
            f"--mdm-ppots-file {path} is not the same file on all nodes: copy one to all of them"
        )


def _missing(*_: Any) -> NoReturn:
    """Stands where a copy of a configuration has lost what `model_config` gave it.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "this model configuration has no hooks of the objective: dataclasses.replace and "
        "serialization lose them. Take the one that build_objective or model_config returned"
    )


class _BuilderHooks:
    """What `model_config` gives a builder: no fields, which Megatron would copy and save."""

    before_model: Callable[[], None] = _missing
    finish_stage: Callable[[Any, int | None], Any] = _missing


@dataclass(kw_only=True)
class MDMModelConfig(_BuilderHooks, GPTModelConfig):
    """Names the builder."""

    builder: ClassVar[str] = f"{__name__}.MDMBuilder"


@dataclass(kw_only=True)
class MDMHybridModelConfig(_BuilderHooks, HybridModelConfig):
    """Names the builder."""

    builder: ClassVar[str] = f"{__name__}.MDMHybridBuilder"


def model_config(
    args: Namespace, mdm: MDMConfig, hooks: TrainingHooks | None = None
) -> MDMModelConfig | MDMHybridModelConfig:
    """Megatron's model configuration with bidirectional attention.

    Args:
        args: parsed and resolved arguments (mcore/flags/arguments.py).
        mdm: settings of the objective.
        hooks: of training; None: the model is not trained.
    """
    fused = args.gradient_accumulation_fusion and find_spec(ACCUMULATES_GRADIENTS) is not None
    flags = Namespace(**vars(args) | {"gradient_accumulation_fusion": fused})
    config: Any
    if args.hybrid_layer_pattern:
        config = hybrid_config_from_args(flags, model_config_cls=MDMHybridModelConfig)
        config.hybrid_stack_spec = bidirectional_stack(config.transformer, mdm)
    else:
        config = gpt_config_from_args(flags, model_config_cls=MDMModelConfig)
        # Megatron parses --rope-scaling-factor and, on this way to the model, leaves it at 8.
        config.rope_scaling_factor = args.rope_scaling_factor
        config.transformer_layer_spec = partial(_layer_spec, mdm=mdm)

    # Plain functions, which Megatron's copies of its configuration share.
    def before_model() -> None:
        _check_ranks_agree(args, mdm)
        if hooks is not None:
            hooks.before_model()

    def finish_stage(model: Any, vp_stage: int | None) -> Any:
        return _finish_stage(model, vp_stage, args, mdm, hooks)

    def router_scale() -> torch.Tensor:
        return router_loss_scale(config.transformer, args.seq_length, mdm.normalization)

    config.before_model, config.finish_stage = before_model, finish_stage
    config.transformer.moe_grad_scale_func = router_scale
    if hooks is not None:
        config.transformer.finalize_model_grads_func = hooks.after_gradients
    return config


def _layer_spec(config: GPTModelConfig, vp_stage: int | None = None, *, mdm: MDMConfig) -> Any:
    return bidirectional_spec(config, mdm, vp_stage)
