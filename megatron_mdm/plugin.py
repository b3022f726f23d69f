"""The functions with which your own script registers the objective with Megatron (README.md)."""

from megatron_mdm.mcore.data.dataset_helpers import use_shipped_dataset_helpers
from megatron_mdm.mcore.device import training_device
from megatron_mdm.mcore.flags.arguments import add_arguments, finalize_args
from megatron_mdm.mcore.training.objective import Objective, build_objective
from megatron_mdm.mcore.training.positions import schedules_positions

__all__ = [
    "Objective",
    "add_arguments",
    "build_objective",
    "finalize_args",
    "schedules_positions",
    "training_device",
    "use_shipped_dataset_helpers",
]
