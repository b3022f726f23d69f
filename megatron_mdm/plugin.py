"""What a script of your own needs to register the objective with Megatron; README shows how."""

from megatron_mdm.mcore.data.dataset_helpers import use_shipped_dataset_helpers
from megatron_mdm.mcore.data.row_dataset import train_valid_test_datasets_provider
from megatron_mdm.mcore.device import training_device
from megatron_mdm.mcore.flags.arguments import add_arguments, finalize_args
from megatron_mdm.mcore.model.builder import model_config
from megatron_mdm.mcore.training.forward_step import forward_step
from megatron_mdm.mcore.training.metrics import evaluation_hook

__all__ = [
    "add_arguments",
    "evaluation_hook",
    "finalize_args",
    "forward_step",
    "model_config",
    "train_valid_test_datasets_provider",
    "training_device",
    "use_shipped_dataset_helpers",
]
