"""The model: all that is peculiar to Megatron's GPTModel, so that HybridModel can follow.

Megatron marks GPTModel as deprecated in favour of HybridModel, into which its checkpoints load.
"""

from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.training import get_args
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.attention import bidirectional_spec
from megatron_mdm.mcore.fp8 import keep_scales_in_evaluation
from megatron_mdm.mcore.metrics import finalize_and_log
from megatron_mdm.mcore.sampler_state import SamplerState, online_sampler


class MDMBuilder(GPTModelBuilder):
    """Megatron's builder, with the state of an online sampler beside the weights.

    Evaluations leave FP8 scales as they are.
    """

    def build_model(self, *args: Any, vp_stage: int | None = None, **kwargs: Any) -> GPTModel:
        """Builds one stage."""
        model = super().build_model(*args, vp_stage=vp_stage, **kwargs)
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


def model_config(args: Namespace) -> MDMModelConfig:
    """Megatron's model configuration with bidirectional attention and the once-per-step hook.

    Args:
        args: parsed and resolved arguments (mcore/arguments.py).
    """
    config = gpt_config_from_args(args, model_config_cls=MDMModelConfig)
    # Megatron parses --rope-scaling-factor and, on this way to the model, leaves it at 8.
    config.rope_scaling_factor = args.rope_scaling_factor
    config.transformer_layer_spec = partial(_layer_spec, mdm=MDMConfig.from_args(args))
    config.transformer.finalize_model_grads_func = finalize_and_log
    return config


def _layer_spec(config: GPTModelConfig, vp_stage: int | None = None, *, mdm: MDMConfig) -> Any:
    return bidirectional_spec(config, mdm, vp_stage)
