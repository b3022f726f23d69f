"""The model: all that is peculiar to Megatron's GPTModel, so that HybridModel can follow.

Megatron marks GPTModel as deprecated in favour of HybridModel, into which its checkpoints load.
"""

from argparse import Namespace
from functools import partial
from typing import Any

from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelConfig

from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.attention import bidirectional_spec
from megatron_mdm.mcore.metrics import finalize_and_log


def model_config(args: Namespace) -> GPTModelConfig:
    """Megatron's model configuration with bidirectional attention and the once-per-step hook.

    Args:
        args: parsed and resolved arguments (mcore/arguments.py).
    """
    config = gpt_config_from_args(args)
    config.transformer_layer_spec = partial(_layer_spec, mdm=MDMConfig.from_args(args))
    config.transformer.finalize_model_grads_func = finalize_and_log
    return config


def _layer_spec(config: GPTModelConfig, vp_stage: int | None = None, *, mdm: MDMConfig) -> Any:
    return bidirectional_spec(config, mdm, vp_stage)
