"""A trained checkpoint as a function from tokens to logits, with nothing to give but its path."""

import contextlib
import os
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import unwrap_model
from megatron.training import set_startup_timestamps
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_args
from megatron.training.checkpointing import _load_base_checkpoint
from megatron.training.global_vars import get_tokenizer, set_global_variables
from megatron.training.initialize import initialize_megatron
from megatron.training.training import setup_model_and_optimizer

from megatron_mdm.config import MDMConfig
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.attention import attention_mask
from megatron_mdm.mcore.dataset import use_shipped_dataset_helpers
from megatron_mdm.mcore.device import CPU_DEFAULTS
from megatron_mdm.mcore.model import model_config

# What the checkpoint's arguments say of the run that wrote it, and how it is here instead.
HERE = {
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "sequence_parallel": False,
    "data_parallel_size": 1,
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "step_batch_size_schedule": None,
    "use_distributed_optimizer": False,
    "overlap_grad_reduce": False,
    "overlap_param_gather": False,
    "recompute_granularity": None,
    "skip_train": True,
    "finetune": True,
    "no_load_optim": True,
    "no_load_rng": True,
    "exit_on_missing_checkpoint": True,
    "mdm_rate_sampler": "uniform",
    "mdm_clip": None,
    "mdm_ppots_file": None,
    "mdm_ppots_refit_interval": 0,
    "save": None,
    "async_save": False,
    "tensorboard_dir": None,
    "wandb_project": "",
}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode.

    Attributes:
        model: Megatron's module.
        args: the arguments of the run that trained it, with this process' layout.
        tokenizer: Megatron's tokenizer.
    """

    model: Any
    args: Namespace
    tokenizer: Any

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the clean tokens.

        Args:
            tokens: int64 [b, s], the same on all ranks.

        Returns:
            float [b, s, V], V the padded vocabulary, on all ranks.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden = attention_mask(
            tokens,
            torch.zeros_like(tokens, dtype=torch.bool),
            self.tokenizer.eod,
            MDMConfig.from_args(self.args),
        )
        output = self.model(tokens, positions, hidden)
        return gather_from_tensor_model_parallel_region(output)


@contextlib.contextmanager
def loaded_model(checkpoint: str, device: str) -> Iterator[LoadedModel]:
    """Loads a checkpoint, whatever layout wrote it, over all ranks as tensor parallel ranks.

    To be entered inside `training_device(device)`; without torchrun it is a single process.

    Raises:
        UserError: there is no checkpoint, or it has no arguments.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    set_startup_timestamps(program_start=time.time(), main_entry=time.time())
    args = _arguments(checkpoint, device)
    set_global_variables(args)
    use_shipped_dataset_helpers()
    initialize_megatron()
    container = pretrain_cfg_container_from_args(args, model_config(args))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    try:
        model, _, _ = setup_model_and_optimizer(
            ModelType.encoder_or_decoder, cfg_container=container, pg_collection=groups
        )
        yield LoadedModel(unwrap_model(model[0]).eval(), args, get_tokenizer())
        torch.distributed.barrier()
    finally:
        mpu.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _arguments(checkpoint: str, device: str) -> Namespace:
    """The checkpoint's own arguments, which Megatron saved validated, with this layout."""
    probe = parse_args(_accept_anything, ignore_unknown_args=True)
    state = _load_base_checkpoint(checkpoint, probe, rank0=True)[0]
    if not state:
        raise UserError(f"no checkpoint in {checkpoint}: give the directory that --save named")
    args = state.get("args")
    if args is None:
        raise UserError(f"the checkpoint in {checkpoint} has no arguments: save it with Megatron")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    own = {
        **HERE,
        "rank": int(os.environ.get("RANK", "0")),
        "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
        "world_size": world,
        "tensor_model_parallel_size": world,
        "expert_tensor_parallel_size": world,
        "tensor_parallel_num_weight_shards": world,
        "expert_tensor_parallel_num_weight_shards": world,
        "load": checkpoint,
        "mdm_device": device,
        **(CPU_DEFAULTS if device == "cpu" else {}),
    }
    for name, value in own.items():
        setattr(args, name, value)
    return args


def _accept_anything(parser: Any) -> Any:
    return parser
