"""Which checkpoint a run starts from, and whether it may save where --save says.

Megatron starts from random weights where --load names nothing, and saves over whatever is there.
A scheduler that gives the same command again would lose a run that way, or begin it anew each time.
"""

import os
import pickle
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.training.checkpointing import _load_base_checkpoint

from megatron_mdm.errors import UserError
from megatron_mdm.mcore.checkpoint_files import SavedCheckpoint, find_checkpoint, is_remote
from megatron_mdm.mcore.notices import notice
from megatron_mdm.mcore.unpickling import check_pickles


def choose_start(args: Namespace) -> str | None:
    """Decides on the checkpoint to load, and makes the arguments say so.

    A command that begins from one directory, or from one iteration of it, and saves into another
    finds checkpoints of its own there when it is given again, and then goes on from these. So
    --load, --ckpt-step and --finetune may change here. `args.mdm_started_from` records how the run
    began.

    Args:
        args: of this run.

    Returns:
        The directory of the checkpoint, None for a start from random weights.

    Raises:
        UserError: a flag names no checkpoint, or a damaged one; or --save holds checkpoints of
            another run, or later ones than this run starts from.
    """
    args.mdm_started_from = _beginning(vars(args))
    saved = _find(args.save, None, args)
    if saved is not None and not args.mdm_overwrite_save:
        _go_on_or_refuse(args, saved)
    if args.load is not None and is_remote(args.load):
        return str(args.load)
    if _loaded(args) is not None:
        return str(args.load)
    if args.non_persistent_ckpt_type == "global" and args.load is not None:
        # Megatron takes these in place of an older one of --load.
        other = args.non_persistent_global_ckpt_dir or os.path.join(args.load, "non_persistent")
        _find_safe(other, None, args)
    pretrained = args.pretrained_checkpoint
    if pretrained is not None and not is_remote(pretrained):
        if _find(pretrained, args.ckpt_step, args) is None:
            raise _no_checkpoint("--pretrained-checkpoint", pretrained)
    return None if pretrained is None else str(pretrained)


def check_checkpoints(args: Namespace) -> None:
    """Checks the checkpoints that Megatron reads while it parses --use-checkpoint-args.

    Raises:
        UserError: one of them is damaged or could run code, or --ckpt-step names none.
    """
    for directory in (args.load, args.pretrained_checkpoint):
        if _find(directory, None, args) is not None:
            _find_safe(directory, args.ckpt_step, args)


def _go_on_or_refuse(args: Namespace, saved: SavedCheckpoint) -> None:
    """Decides on a start where --save holds a checkpoint; see `choose_start`."""
    in_place = args.load is not None and _place(args.load) == _place(args.save)
    before = saved_arguments(args, args.save)
    began = before.get("mdm_started_from") or _beginning(before)
    if in_place and args.ckpt_step is None and not args.finetune:
        args.mdm_started_from = began
    elif args.load is not None and args.mdm_started_from == began:
        notice(
            f"--save {args.save} holds {saved} of the run that this command began: the run goes on "
            "from there (--mdm-overwrite-save begins it again)"
        )
        args.load, args.ckpt_step, args.finetune = args.save, None, False
    elif in_place and not args.finetune:
        notice(
            f"--ckpt-step {args.ckpt_step} goes back from {saved} of {args.save}: the run saves "
            "over later iterations"
        )
    elif not in_place or saved.iteration is not None:  # a release is not saved over
        remedy = "leave out --finetune" if in_place else f"give --load {args.save}"
        raise UserError(
            f"--save {args.save} holds {saved} of a run that this command does not continue: "
            f"{remedy} to go on from it, or give another --save (--mdm-overwrite-save saves over "
            "it)"
        )


def _loaded(args: Namespace) -> SavedCheckpoint | None:
    """The checkpoint that --load names.

    Raises:
        UserError: there is none, and nothing says that this is the first start of a run.
    """
    if args.load is None:
        return None
    if args.pretrained_checkpoint is not None and _find(args.load, None, args) is None:
        return None  # the first start: --ckpt-step is of the other checkpoint
    found = _find(args.load, args.ckpt_step, args)
    is_first_start = args.save is not None and _place(args.load) == _place(args.save)
    if found is None and (args.finetune or not is_first_start):
        raise _no_checkpoint("--load", args.load)
    return found


def _find(directory: str | None, iteration: int | None, args: Namespace) -> SavedCheckpoint | None:
    if directory is None or is_remote(directory):
        return None
    return find_checkpoint(directory, iteration, args.ckpt_format)


def _find_safe(directory: str | None, iteration: int | None, args: Namespace) -> None:
    """Checks that a checkpoint, if there is one, is whole and that reading it runs nothing.

    Raises:
        UserError: it is not.
    """
    found = _find(directory, iteration, args)
    if found is not None:
        check_pickles(found.path)


def _no_checkpoint(name: str, directory: str) -> UserError:
    return UserError(
        f"{name} {directory} has no checkpoint: give the directory that --save or "
        "tools/convert_checkpoint.py --output named"
    )


def _beginning(args: Mapping[str, Any]) -> dict[str, Any]:
    """How a command says that its run begins; equal for the same command given again."""
    pretrained = args.get("pretrained_checkpoint")
    return {
        "load": _place(args.get("load")),
        "pretrained_checkpoint": _place(pretrained),
        "ckpt_step": args.get("ckpt_step"),
        # Megatron sets it by itself after a start from --pretrained-checkpoint.
        "finetune": bool(args.get("finetune")) and pretrained is None,
    }


def _place(directory: str | None) -> str | None:
    if directory is None or is_remote(directory):
        return directory
    return os.path.realpath(directory)


def saved_arguments(
    args: Namespace, directory: str, iteration: int | None = None
) -> dict[str, Any]:
    """The arguments that a checkpoint holds; empty if it has none.

    Args:
        args: of this run.
        directory: of the checkpoint.
        iteration: of the checkpoint (--ckpt-step); None: the one that the tracker names.

    Raises:
        UserError: they cannot be read, or the checkpoint could run code.
    """
    _find_safe(directory, iteration, args)
    asked = Namespace(**{**vars(args), "ckpt_step": iteration})
    try:
        state = _load_base_checkpoint(directory, asked, rank0=True)[0]
    except (
        CheckpointingException,
        dcp.api.CheckpointException,
        EOFError,
        OSError,
        RuntimeError,
        pickle.UnpicklingError,
    ) as error:
        raise UserError(
            f"the checkpoint in {directory} is damaged, its arguments cannot be read: take an "
            "earlier one with --ckpt-step, or a copy"
        ) from error
    return vars(state["args"]) if state and state.get("args") else {}
