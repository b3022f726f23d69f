"""What a script of your own needs to register the objective with Megatron; README shows how."""

from megatron_mdm.mcore.arguments import add_arguments, resolve
from megatron_mdm.mcore.dataset import (
    train_valid_test_datasets_provider,
    use_shipped_dataset_helpers,
)
from megatron_mdm.mcore.device import training_device
from megatron_mdm.mcore.forward_step import forward_step
from megatron_mdm.mcore.metrics import evaluation_hook
from megatron_mdm.mcore.model import model_config

__all__ = [
    "add_arguments",
    "evaluation_hook",
    "forward_step",
    "model_config",
    "resolve",
    "train_valid_test_datasets_provider",
    "training_device",
    "use_shipped_dataset_helpers",
]
