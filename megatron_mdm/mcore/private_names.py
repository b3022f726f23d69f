"""The names of Megatron, torch and argparse that this package uses although they are not public.

They are private names, functions that this package replaces, and constants of Megatron's own
modules. A new version may rename them without notice. `missing` then says which are gone.
"""

import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

# Owner, as module or module:class, and its names. mcore/device.py has those of the CPU mode.
PRIVATE_NAMES: Mapping[str, tuple[str, ...]] = {
    # Replaced, or set, while Megatron trains.
    "megatron.training.training": (
        *("get_forward_backward_func", "load_checkpoint", "report_memory"),
        "report_theoretical_memory",
    ),
    "megatron.training.global_vars": ("_GLOBAL_SIGNAL_HANDLER",),
    "megatron.core.rerun_state_machine:RerunStateMachine": (
        *("should_run_forward_backward", "should_checkpoint_and_exit", "first_iteration_complete"),
    ),
    # Checkpoints.
    "megatron.training.checkpointing": (
        *("_load_base_checkpoint", "load_args_from_checkpoint", "maybe_msc"),
    ),
    "megatron.core.dist_checkpointing": ("load", "save"),
    "megatron.core.dist_checkpointing.strategies.async_utils": ("PersistentAsyncCaller",),
    "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller": (
        *("_get_process", "_persistent_process", "async_loop"),
    ),
    "megatron.core.dist_checkpointing.strategies.filesystem_async": ("_results_queue",),
    "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync": (
        "preload_tensors",
    ),
    "megatron.core.optimizer.optimizer": ("param_group_identifier_keys",),
    "megatron.core.optimizer.optimizer:FP32Optimizer": ("load_state_dict",),
    "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params": ("load_state_dict",),
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer": (
        *("load_state_dict", "state_dict", "_set_main_param_and_optimizer_states"),
    ),
    "torch.nn:Module": ("_load_from_state_dict",),
    # Models.
    "megatron.training.models.gpt:GPTModelBuilder": ("_model_config",),
    "megatron.training.models.hybrid:HybridModelBuilder": ("_model_config",),
    "megatron.core.models.hybrid.hybrid_model:HybridModel": ("_scale_logits",),
    "megatron.core.transformer.moe.router:TopKRouter": ("_apply_seq_aux_loss",),
    # Data.
    "megatron.core.datasets.utils": ("compile_helpers",),
    "megatron.core.datasets.indexed_dataset": ("_INDEX_HEADER",),
    "megatron.core.datasets.gpt_dataset": ("numpy",),
    "megatron.core.datasets.gpt_dataset:GPTDataset": (
        "_build_document_sample_shuffle_indices",
        "_get_num_tokens_per_epoch",
        "_query_document_sample_shuffle_indices",
    ),
    "megatron.core.datasets.blended_dataset": ("numpy",),
    "megatron.core.datasets.blended_dataset:BlendedDataset": ("_build_indices",),
    "megatron.core.tokenizers.text.text_tokenizer:MegatronTokenizerText": ("_tokenizer",),
    # Flags.
    "megatron.training.argument_utils:ArgumentGroupFactory": (
        *("_build_argparse_kwargs_from_field", "_format_arg_name"),
    ),
    "argparse": ("_ActionsContainer",),
    "argparse:ArgumentParser": ("_action_groups", "_actions", "_get_formatter"),
    "argparse:_ArgumentGroup": ("_group_actions",),
    "argparse:HelpFormatter": ("_expand_help",),
    # The launcher.
    "torch.distributed.launcher.api": ("LocalElasticAgent",),
    "torch.distributed.elastic.agent.server.local_elastic_agent:LocalElasticAgent": (
        *("_monitor_workers", "_pcontext", "_remaining_restarts"),
    ),
    # The rehearsal.
    "torch.distributed": ("broadcast_object_list",),
    # The CPU mode.
    "megatron.training.initialize": ("_warmup_jit_function",),
    "megatron.core.transformer.moe.token_dispatcher": ("maybe_move_tensor_to_cpu",),
    "torch.accelerator": ("is_available",),
    "torch.cuda": (
        *("Event", "Stream", "_lazy_call", "_lazy_init", "current_device", "current_stream"),
        *("default_generators", "default_stream", "device_count", "device_memory_used"),
        *("empty_cache", "get_device_capability", "get_device_properties", "get_rng_state"),
        *("is_available", "is_current_stream_capturing", "manual_seed", "manual_seed_all"),
        *("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"),
        *("reset_peak_memory_stats", "set_device", "set_rng_state", "stream", "synchronize"),
    ),
    "torch.cuda.random": ("get_rng_state",),
}


def missing(names: Mapping[str, tuple[str, ...]] = PRIVATE_NAMES) -> list[str]:
    """The names that the installed versions do not have; it imports their modules.

    Args:
        names: owners, as module or module:class, and their names.

    Returns:
        Owner and name, each as a dotted path.
    """
    return [
        f"{owner.replace(':', '.')}.{name}"
        for owner, wanted in names.items()
        for name in wanted
        if not _has(owner, name)
    ]


def _has(owner: str, name: str) -> bool:
    try:
        found = pkgutil.resolve_name(owner)
    except (ImportError, AttributeError):
        return False
    return hasattr(found, name) or (inspect.isclass(found) and _sets_attribute(found, name))


def _sets_attribute(kind: Any, name: str) -> bool:
    """Whether the methods of a class or its bases set the attribute of an instance."""
    bases = [base for base in inspect.getmro(kind) if base.__module__ != "builtins"]
    return any(f"self.{name}" in inspect.getsource(base) for base in bases)
