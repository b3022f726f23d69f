"""Loads the optimizer's state of a checkpoint into a run with other rates, precision or layout.

Megatron pairs the parameter groups of a checkpoint with those of the run by their settings. These
include learning rates and weight decays, so with another learning rate Megatron finds no group of
the run in the checkpoint. It takes other settings, such as Adam's betas, from the checkpoint.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    param_group_identifier_keys,
)

from megatron_mdm.errors import SharedError, UserError
from megatron_mdm.mcore.argument_groups import changes
from megatron_mdm.mcore.device import replaced

Group = dict[str, Any]

# The remedy if the distributed optimizer's usual format does not fit the layout.
ANOTHER_LAYOUT = (
    "Go on with the flags of the checkpoint, to which --dist-ckpt-optim-fully-reshardable may be "
    "added: checkpoints saved with it fit every layout, and --mdm-model hybrid. Or add "
    "--no-load-optim, which begins the optimizer's averages anew"
)

# Settings of a group that come from the schedule's flags.
RATES = ("max_lr", "min_lr", "start_wd", "end_wd")
# Entries of a group that are not settings: parameters, and values that change during training.
_PROGRESS = ("params", "step", "lr", "weight_decay")
# Settings that distinguish groups independently of the rates. Groups of --decoupled-lr have a false
# default_config.
_KIND = (*(name for name in param_group_identifier_keys if name not in RATES), "default_config")

# Megatron's optimizers, and the path to the groups in the state dict of each.
_OPTIMIZERS: dict[Any, tuple[str, ...]] = {
    DistributedOptimizer: ("optimizer", "param_groups"),
    Float16OptimizerWithFloat16Params: ("optimizer", "param_groups"),
    FP32Optimizer: ("param_groups",),
}

# Each of these arguments changes the buffers of the distributed optimizer, and its usual format
# stores the buffers unchanged. Bucket sizes also change them if a stage has several buckets;
# loading.py reports that case.
_BUFFERS = """
tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
pipeline_model_parallel_layout account_for_embedding_in_pipeline_split
account_for_loss_in_pipeline_split bf16 fp16 accumulate_allreduce_grads_in_fp32
mdm_model
""".split()
_OF_EXPERTS = ["expert_model_parallel_size", "expert_tensor_parallel_size"]


def check_optimizer_state(args: Namespace, saved: Mapping[str, Any]) -> None:
    """Checks that this run can read the optimizer's state in the checkpoint that it resumes.

    Args:
        args: arguments of this run.
        saved: arguments in the checkpoint; empty if there is none.

    Raises:
        UserError: names the flags that differ, and the remedy.
    """
    is_read = args.load is not None and not (args.finetune or args.no_load_optim or args.skip_train)
    if not is_read or not saved or saved.get("no_save_optim") or args.ckpt_format != "torch_dist":
        return
    other = changes(args, saved, ["optimizer", "use_distributed_optimizer"])
    if not args.use_distributed_optimizer and _is_mixed(vars(args)) != _is_mixed(saved):
        other += changes(args, saved, ["bf16", "fp16"])
    if (args.decoupled_lr is None) != (saved.get("decoupled_lr") is None):
        other += changes(args, saved, ["decoupled_lr"])  # the flag adds parameter groups
    if other:
        raise UserError(
            f"the optimizer's state in {args.load} is of another kind: {'; '.join(other)}. "
            "Give these flags their values in the checkpoint, or add --no-load-optim, which "
            "begins the optimizer's averages anew"
        )
    if args.use_distributed_optimizer and not saved.get("dist_ckpt_optim_fully_reshardable"):
        buffers = [*_BUFFERS, *(_OF_EXPERTS if args.num_experts else [])]
        if saved.get("hybrid_layer_pattern"):
            buffers.append("hybrid_layer_pattern")  # it says which layers a stage has
        other = changes(args, saved, buffers)
        if other:
            raise UserError(
                f"the optimizer's state in {args.load} fits only the layout that saved it: "
                f"{'; '.join(other)}. {ANOTHER_LAYOUT}"
            )


def _is_mixed(args: Mapping[str, Any]) -> bool:
    return bool(args.get("bf16") or args.get("fp16"))


@contextmanager
def settings_may_differ(args: Namespace) -> Iterator[None]:
    """Context in which a run that resumes uses the optimizer settings of its own flags.

    Groups are paired by their kind and take their settings from this run. With
    --use-checkpoint-opt_param-scheduler they keep the checkpoint's rates.

    Args:
        args: arguments of this run.

    Raises:
        SharedError: the checkpoint has other groups of parameters.
    """
    with ExitStack() as stack:
        for kind, place in _OPTIMIZERS.items():
            load = _with_settings(kind.load_state_dict, place, args)
            stack.enter_context(replaced(kind, "load_state_dict", load))
        yield


def _with_settings(
    load: Callable[[Any, Any], None], place: tuple[str, ...], args: Namespace
) -> Callable[[Any, Any], None]:
    def load_with_settings(optimizer: Any, state_dict: Any) -> None:
        groups = state_dict
        for name in place:
            groups = groups[name]
        current = optimizer.optimizer.param_groups
        for ours, theirs in zip(current, counterparts(current, groups), strict=True):
            adapt(ours, theirs, args.use_checkpoint_opt_param_scheduler)
        load(optimizer, state_dict)

    return load_with_settings


def counterparts(current: list[Group], saved: list[Group]) -> list[Group]:
    """The group of a checkpoint that corresponds to each group of this run's optimizer.

    Args:
        current: groups of this run.
        saved: groups of the checkpoint, in any order.

    Raises:
        SharedError: the kinds of groups differ; or several groups are of one kind, and their rates
            have changed.
    """
    for identity in (_KIND, (*_KIND, *RATES)):
        ours = [_identity(group, identity) for group in current]
        theirs = {_identity(group, identity): group for group in saved}
        if len(theirs) == len(saved) == len(set(ours)) and theirs.keys() == set(ours):
            return [theirs[key] for key in ours]
    raise SharedError(
        f"the checkpoint's optimizer has other groups of parameters ({len(saved)}, this run "
        f"{len(current)}): give --decoupled-lr, --decoupled-min-lr, --apply-wd-to-qk-layernorm and "
        "other flags that divide the parameters as in the checkpoint, or add --no-load-optim, "
        "which begins the optimizer's averages anew"
    )


def _identity(group: Group, names: tuple[str, ...]) -> tuple[Any, ...]:
    # NeMo's names begin with pre_. Megatron treats a missing value as None.
    return tuple(group.get(name, group.get(f"pre_{name}")) for name in names)


def adapt(current: Group, saved: Group, keep_rates: bool) -> None:
    """Makes the settings of a pair of groups equal, so that Megatron pairs them too.

    Args:
        current: group of this run; it takes the checkpoint's rates if `keep_rates`.
        saved: group of the checkpoint; it takes all other settings of this run.
        keep_rates: whether the checkpoint's rates are kept.
    """
    if keep_rates:
        _take(current, saved, set(RATES))
    _take(saved, current, (saved.keys() | current.keys()) - set(_PROGRESS))


def _take(group: Group, other: Group, names: set[str]) -> None:
    for name in names:
        if name in other:
            group[name] = other[name]
        else:
            group.pop(name, None)
