"""The optimizer's state in a checkpoint, for a run with other rates, precision or layout.

Megatron pairs the parameter groups of a checkpoint with those of the run by their settings. These
include learning rates and weight decays, so that a run with another rate finds none of its groups.
It takes the other settings, Adam's betas for example, from the checkpoint.
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

# What helps where the distributed optimizer's usual format does not fit.
ANOTHER_LAYOUT = (
    "Go on with the flags of the checkpoint, to which --dist-ckpt-optim-fully-reshardable may be "
    "added: what is saved with it fits every layout. Or add --no-load-optim, which begins the "
    "optimizer's averages anew"
)

# Settings of a group that follow from the flags of the schedule.
RATES = ("max_lr", "min_lr", "start_wd", "end_wd")
# The rest of a group that is not a setting: parameters, and what the schedule and the steps set.
_PROGRESS = ("params", "step", "lr", "weight_decay")
# These settings tell groups apart whatever the rates are. Groups of --decoupled-lr have a
# default_config that is false.
_KIND = (*(name for name in param_group_identifier_keys if name not in RATES), "default_config")

# Megatron's optimizers, and where the state of one holds its groups.
_OPTIMIZERS: dict[Any, tuple[str, ...]] = {
    DistributedOptimizer: ("optimizer", "param_groups"),
    Float16OptimizerWithFloat16Params: ("optimizer", "param_groups"),
    FP32Optimizer: ("param_groups",),
}

# Each of them changes the buffers of the distributed optimizer, which its usual format holds as
# they are. So do sizes of buckets, where a stage has several: loading.py has a line for these.
_BUFFERS = """
tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
pipeline_model_parallel_layout account_for_embedding_in_pipeline_split
account_for_loss_in_pipeline_split bf16 fp16 accumulate_allreduce_grads_in_fp32
""".split()
_OF_EXPERTS = ["expert_model_parallel_size", "expert_tensor_parallel_size"]


def check_optimizer_state(args: Namespace, saved: Mapping[str, Any]) -> None:
    """Checks that this run can read the optimizer's state in the checkpoint that it resumes.

    Args:
        args: of this run.
        saved: of the checkpoint; empty if there is none.

    Raises:
        UserError: names the flags that differ, and what to do.
    """
    is_read = args.load is not None and not (args.finetune or args.no_load_optim or args.skip_train)
    if not is_read or not saved or saved.get("no_save_optim") or args.ckpt_format != "torch_dist":
        return
    other = changes(args, saved, ["optimizer", "use_distributed_optimizer"])
    if not args.use_distributed_optimizer and _is_mixed(vars(args)) != _is_mixed(saved):
        other += changes(args, saved, ["bf16", "fp16"])
    if (args.decoupled_lr is None) != (saved.get("decoupled_lr") is None):
        other += changes(args, saved, ["decoupled_lr"])  # which has groups of its own
    if other:
        raise UserError(
            f"the optimizer's state in {args.load} is of another kind: {'; '.join(other)}. "
            "Give these flags their values in the checkpoint, or add --no-load-optim, which "
            "begins the optimizer's averages anew"
        )
    if args.use_distributed_optimizer and not saved.get("dist_ckpt_optim_fully_reshardable"):
        other = changes(args, saved, _BUFFERS + (_OF_EXPERTS if args.num_experts else []))
        if other:
            raise UserError(
                f"the optimizer's state in {args.load} fits the layout that saved it alone: "
                f"{'; '.join(other)}. {ANOTHER_LAYOUT}"
            )


def _is_mixed(args: Mapping[str, Any]) -> bool:
    return bool(args.get("bf16") or args.get("fp16"))


@contextmanager
def settings_may_differ(args: Namespace) -> Iterator[None]:
    """Context in which a run resumes with the optimizer's settings that its own flags say.

    Groups are paired by their kind, and take their settings from this run. With
    --use-checkpoint-opt_param-scheduler the rates stay those of the checkpoint.

    Args:
        args: of this run.

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
    """The group of a checkpoint for each group of this run's optimizer.

    Args:
        current: groups of this run.
        saved: of the checkpoint, in any order.

    Raises:
        SharedError: they are not of the same kinds, or there are several of a kind whose rates
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
        "whatever else divides the parameters as in the checkpoint, or add --no-load-optim, which "
        "begins the optimizer's averages anew"
    )


def _identity(group: Group, names: tuple[str, ...]) -> tuple[Any, ...]:
    # NeMo has names that begin with pre_. A missing value is Megatron's None.
    return tuple(group.get(name, group.get(f"pre_{name}")) for name in names)


def adapt(current: Group, saved: Group, keep_rates: bool) -> None:
    """Makes the settings of a pair of groups equal, so that Megatron pairs them as well.

    Args:
        current: group of this run; takes the checkpoint's rates if they are kept.
        saved: of the checkpoint; takes all other settings of this run.
        keep_rates: whether the rates stay those of the checkpoint.
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
