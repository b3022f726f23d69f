"""The model: Megatron's GPTModel or, with --hybrid-layer-pattern, its HybridModel.

Megatron marks GPTModel as deprecated in favour of HybridModel, into which its checkpoints load.
"""

from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.training import get_args
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.arguments import megatron_may_reject_flags
from megatron_mdm.mcore.attention import bidirectional_spec, leave_out_state_of_norms
from megatron_mdm.mcore.fp8 import keep_scales_in_evaluation
from megatron_mdm.mcore.hybrid import HybridModelWithHead, bidirectional_stack
from megatron_mdm.mcore.metrics import finalize_and_log
from megatron_mdm.mcore.routers import count_short_rows, router_loss_scale
from megatron_mdm.mcore.sampler_state import SamplerState, online_sampler


class MDMBuilder(GPTModelBuilder):
    """Megatron's builder, with the state of an online sampler beside the weights.

    Checkpoints of local and of Transformer Engine's layers have the same keys, and evaluations
    leave FP8 scales as they are.
    """

    def build_model(self, *args: Any, vp_stage: int | None = None, **kwargs: Any) -> GPTModel:
        """Builds one stage."""
        with megatron_may_reject_flags():
            model = super().build_model(*args, vp_stage=vp_stage, **kwargs)
        return _equipped(model, vp_stage)


class MDMHybridBuilder(HybridModelBuilder):
    """The same for HybridModel, whose class Megatron's builder fixes."""

    def build_model(self, *args: Any, vp_stage: int | None = None, **kwargs: Any) -> HybridModel:
        """Builds one stage."""
        with megatron_may_reject_flags():
            model = super().build_model(*args, vp_stage=vp_stage, **kwargs)
        model.__class__ = HybridModelWithHead
        return _equipped(model, vp_stage)


def _equipped(model: Any, vp_stage: int | None) -> Any:
    leave_out_state_of_norms(model)
    if MDMConfig.from_args(get_args()).mdm_random_length_fraction:
        count_short_rows(model)
    if model.config.fp8:
        keep_scales_in_evaluation(model)
    if online_sampler() is not None:
        in_checkpoint = getattr(get_args(), "mdm_sampler_state_in_checkpoint", False)
        model.mdm_sampler = SamplerState(model.config, vp_stage, in_checkpoint)
    return model


@dataclass(kw_only=True)
class MDMModelConfig(GPTModelConfig):
    """Names the builder."""

    builder: ClassVar[str] = f"{__name__}.MDMBuilder"


@dataclass(kw_only=True)
class MDMHybridModelConfig(HybridModelConfig):
    """Names the builder."""

    builder: ClassVar[str] = f"{__name__}.MDMHybridBuilder"


def model_config(args: Namespace) -> MDMModelConfig | MDMHybridModelConfig:
    """Megatron's model configuration with bidirectional attention and the once-per-step hook.

    Args:
        args: parsed and resolved arguments (mcore/arguments.py).
    """
    mdm = MDMConfig.from_args(args)
    config: Any
    if args.hybrid_layer_pattern:
        config = hybrid_config_from_args(args, model_config_cls=MDMHybridModelConfig)
        config.hybrid_stack_spec = bidirectional_stack(config.transformer, mdm)
    else:
        config = gpt_config_from_args(args, model_config_cls=MDMModelConfig)
        # Megatron parses --rope-scaling-factor and, on this way to the model, leaves it at 8.
        config.rope_scaling_factor = args.rope_scaling_factor
        config.transformer_layer_spec = partial(_layer_spec, mdm=mdm)
    config.transformer.finalize_model_grads_func = finalize_and_log
    config.transformer.moe_grad_scale_func = partial(router_loss_scale, config.transformer, args)
    return config


def _layer_spec(config: GPTModelConfig, vp_stage: int | None = None, *, mdm: MDMConfig) -> Any:
    return bidirectional_spec(config, mdm, vp_stage)
