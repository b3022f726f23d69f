"""Decides which checkpoint a run starts from, and whether it may save into --save.

Megatron starts from random weights if the directory of --load has no checkpoint, and overwrites
whatever --save holds. If a scheduler repeats the same command, the run would be lost or would begin
again each time.
"""

import os
import pickle
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.training.checkpointing import _load_base_checkpoint

from megatron_mdm.config import flag
from megatron_mdm.data.record import digest
from megatron_mdm.errors import SharedError, UserError
from megatron_mdm.mcore.checkpoint.files import (
    SavedCheckpoint,
    find_checkpoint,
    is_remote,
    unfinished,
)
from megatron_mdm.mcore.checkpoint.unpickling import check_pickles
from megatron_mdm.mcore.ranks import equal_on_all_ranks, is_first_rank, notice

SUMMED = "torch_dist"  # the checkpoint format whose files have checksums (saving.py)
# Arguments that apply when a run begins, not when it continues.
_CHANGEABLE = ("finetune", "no_load_optim", "no_load_rng")


@dataclass(frozen=True)
class Start:
    """How a run begins or continues.

    Attributes:
        source: directory of the checkpoint that the run loads; None: it starts from random weights.
        saved: the arguments in the checkpoint; empty if it has none.
        arguments: new values for the run's own arguments, by name. --load, --ckpt-step, --finetune,
            --no-load-optim and --no-load-rng may be among them; `mdm_started_from` records how the
            run began.
    """

    source: str | None
    saved: dict[str, Any]
    arguments: dict[str, Any]


def choose_start(args: Namespace) -> Start:
    """Chooses the checkpoint to load.

    A command may begin from one directory, or from one iteration in it, and save into another. When
    the same command is given again, it finds its own checkpoints in --save and continues from them.
    A converted model or --pretrained-checkpoint begins a new run.

    Args:
        args: arguments of this run; not changed.

    Raises:
        UserError: a flag names no checkpoint or a damaged one; or --save holds checkpoints of
            another run, or later ones than the start of this run.
    """
    _say_what_is_not_checked(args)
    changed: dict[str, Any] = {"mdm_started_from": _beginning(vars(args))}
    saves_over = args.skip_train or args.mdm_overwrite_save
    own = None if saves_over else _find(args.save, None, args)
    _say_what_is_unfinished(args)
    of_own = {} if own is None else saved_arguments(args, own)
    if own is not None:
        changed |= _go_on_or_refuse(args, own, of_own)
    chosen = Namespace(**{**vars(args), **changed})
    source, found = _source(chosen)
    is_converted = found is not None and found.iteration is None
    if is_converted or source not in (None, chosen.load):  # Megatron sets it when it loads these
        changed["finetune"] = chosen.finetune = True
    if source is None:
        return Start(None, {}, changed)
    if own is not None and _is_same(found, own):
        return Start(source, of_own, changed)
    checkpoint = found or SavedCheckpoint(source, chosen.ckpt_step)
    return Start(source, saved_arguments(chosen, checkpoint), changed)


def check_same_start(args: Namespace) -> None:
    """Checks that all ranks start from the same checkpoint; a collective call.

    Each rank has read its own view of the disk, and a shared disk may show nodes different files.

    Raises:
        SharedError: ranks would start from different checkpoints.
    """
    names = ("load", "pretrained_checkpoint", "ckpt_step", *_CHANGEABLE)
    start = {name: getattr(args, name) for name in names}
    if not equal_on_all_ranks(digest(start)):
        where = args.load or args.pretrained_checkpoint or "random weights"
        raise SharedError(
            f"the ranks see different checkpoints: this one would start from {where}, others from "
            "another checkpoint or with other flags. Check that --save and --load are the same "
            "directories on all nodes, and start again"
        )


def check_checkpoints(args: Namespace) -> None:
    """Checks the checkpoints that Megatron reads while it parses --use-checkpoint-args.

    Raises:
        UserError: a checkpoint is damaged or could run code, or --ckpt-step names none.
    """
    for directory in (args.load, args.pretrained_checkpoint):
        if _find(directory, None, args) is not None:
            found = _find(directory, args.ckpt_step, args)
            assert found is not None  # else it has raised
            check_pickles(found.path)


def _say_what_is_not_checked(args: Namespace) -> None:
    for name in ("save", "load", "pretrained_checkpoint"):
        directory = getattr(args, name)
        if directory is not None and is_remote(directory):
            notice(
                f"{flag(name)} {directory} is in an object storage: nothing checks that the "
                "checkpoints there are complete, unchanged and harmless, or that they are this "
                "run's"
            )
    if args.save is not None and args.ckpt_format != SUMMED and args.mdm_checkpoint_hashes:
        notice(
            f"checkpoints of --ckpt-format {args.ckpt_format} have no sums of their files; those "
            f"of {SUMMED} have"
        )


def _say_what_is_unfinished(args: Namespace) -> None:
    if args.save is None or is_remote(args.save) or not is_first_rank():
        return
    if names := unfinished(args.save, args.ckpt_format):
        notice(
            f"--save {args.save} holds unfinished checkpoints of a killed run, {', '.join(names)}: "
            "nothing reads them, and they may be deleted"
        )


def _go_on_or_refuse(
    args: Namespace, own: SavedCheckpoint, saved: Mapping[str, Any]
) -> dict[str, Any]:
    """Chooses new values of arguments if --save holds a checkpoint; see `choose_start`.

    Args:
        args: arguments of this run.
        own: the checkpoint in --save.
        saved: the arguments in that checkpoint.

    Raises:
        UserError: the checkpoint is of a run that this command does not continue.
    """
    in_place = args.load is not None and _place(args.load) == _place(args.save)
    begins, began = _beginning(vars(args)), saved.get("mdm_started_from") or _beginning(saved)
    if in_place and begins == _beginning({"load": args.load}):
        return {"mdm_started_from": began}
    if args.load is not None and begins == began:
        notice(
            f"--save {args.save} holds {own} of the run that this command began: the run goes on "
            "from there (--mdm-overwrite-save begins it again)"
        )
        return {"load": args.save, "ckpt_step": None, **dict.fromkeys(_CHANGEABLE, False)}
    if in_place and not args.finetune:
        if args.ckpt_step is not None:
            notice(
                f"--ckpt-step {args.ckpt_step} goes back from {own} of {args.save}: the run saves "
                "over later iterations"
            )
    elif not in_place or own.iteration is not None:  # saving does not overwrite a release
        remedy = "leave out --finetune" if in_place else f"give --load {args.save}"
        raise UserError(
            f"--save {args.save} holds {own} of a run that this command does not continue: "
            f"{remedy} to go on from it, or give another --save (--mdm-overwrite-save saves over "
            "it)"
        )
    return {}


def _source(args: Namespace) -> tuple[str | None, SavedCheckpoint | None]:
    """The directory that the run starts from, and the checkpoint in it.

    Returns:
        The directory is None for a start from random weights. The checkpoint is None if the
        directory is in an object storage.

    Raises:
        UserError: a directory has no checkpoint, and this is not the first start of a run.
    """
    pretrained, is_given = args.pretrained_checkpoint, args.load is not None
    if is_given and is_remote(args.load):
        return args.load, None
    # At the first start --ckpt-step refers to --pretrained-checkpoint.
    if is_given and (pretrained is None or _find(args.load, None, args) is not None):
        found = _find(args.load, args.ckpt_step, args)
        if found is not None:
            return args.load, found
        is_first_start = args.save is not None and _place(args.load) == _place(args.save)
        if args.finetune or not is_first_start:
            raise _no_checkpoint("--load", args.load)
    if pretrained is None or is_remote(pretrained):
        return pretrained, None
    found = _find(pretrained, args.ckpt_step, args)
    if found is None:
        raise _no_checkpoint("--pretrained-checkpoint", pretrained)
    return pretrained, found


def _find(directory: str | None, iteration: int | None, args: Namespace) -> SavedCheckpoint | None:
    if directory is None or is_remote(directory):
        return None
    return find_checkpoint(directory, iteration, args.ckpt_format)


def _is_same(one: SavedCheckpoint | None, other: SavedCheckpoint) -> bool:
    return one is not None and os.path.realpath(one.path) == os.path.realpath(other.path)


def _no_checkpoint(name: str, directory: str) -> UserError:
    return UserError(
        f"{name} {directory} has no checkpoint: give the directory that --save or "
        "tools/convert_checkpoint.py --output named"
    )


def _beginning(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a command that say how its run begins; equal if the command is repeated."""
    pretrained = args.get("pretrained_checkpoint")
    return {
        "load": _place(args.get("load")),
        "pretrained_checkpoint": _place(pretrained),
        "ckpt_step": args.get("ckpt_step"),
        # Megatron sets it itself after a start from --pretrained-checkpoint.
        "finetune": bool(args.get("finetune")) and pretrained is None,
        "no_load_optim": bool(args.get("no_load_optim")),
        "no_load_rng": bool(args.get("no_load_rng")),
    }


def _place(directory: str | None) -> str | None:
    if directory is None or is_remote(directory):
        return directory
    return os.path.realpath(directory)


def saved_arguments(args: Namespace, checkpoint: SavedCheckpoint) -> dict[str, Any]:
    """The arguments that a checkpoint holds; empty if it has none.

    `iteration` is the checkpoint's own. Megatron sets this argument only when it loads one, so the
    first process of a run saves 0.

    Args:
        args: arguments of this process, which tell Megatron how to read the checkpoint.
        checkpoint: result of `find_checkpoint`, or a checkpoint in an object storage.

    Raises:
        UserError: the arguments cannot be read, or the checkpoint could run code.
    """
    directory = checkpoint.directory
    if not is_remote(directory):
        check_pickles(checkpoint.path)
    asked = Namespace(**{**vars(args), "ckpt_step": checkpoint.iteration})
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
            "earlier one, or a copy"
        ) from error
    if not state or not state.get("args"):
        return {}
    return {**vars(state["args"]), "iteration": state.get("iteration", 0)}
