"""The checkpoint that a run starts from: which one it is, and whether its settings agree."""

import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from megatron.training.checkpointing import _load_base_checkpoint, checkpoint_exists

from megatron_mdm.config import MDMConfig, flag
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.unpickling import check_pickles_to_load
from megatron_mdm.objective.fit_file import load_sampler


def checkpoint_to_load(args: Namespace) -> str | None:
    """The directory of the checkpoint that Megatron is about to load, None for none.

    Raises:
        UserError: there is none where --pretrained-checkpoint, or --load with --finetune, says.
    """
    if checkpoint_exists(args.load):
        return args.load
    needed = "pretrained_checkpoint"
    if args.pretrained_checkpoint is None:
        if not args.finetune or args.load is None:
            return args.load
        needed = "load"  # Megatron would train from random weights, with a warning
    directory = getattr(args, needed)
    if not checkpoint_exists(directory):
        raise UserError(
            f"{flag(needed)} {directory} has no checkpoint: give the directory that --save or "
            "tools/convert_checkpoint.py --output named"
        )
    return str(directory)


def saved_arguments(args: Namespace, source: str | None) -> dict[str, Any]:
    """The arguments that the checkpoint in the directory `source` holds; empty if there are none.

    Args:
        args: of this run.
        source: see `checkpoint_to_load`.
    """
    if source is None:
        return {}
    check_pickles_to_load(source, args.ckpt_step)
    state = _load_base_checkpoint(source, args, rank0=True)[0]
    return vars(state["args"]) if state and state.get("args") else {}


def check_resume(args: Namespace, saved: dict[str, Any]) -> None:
    """Compares the objective flags with those of the checkpoint that is about to be resumed.

    Masks and rates are functions of the seed, the flags and the row number: a change would train
    another objective from here on, silently.

    Args:
        args: of this run.
        saved: of the checkpoint; empty if there is none.

    Raises:
        UserError: names every flag that differs, unless --mdm-allow-flag-change.
    """
    is_resumed = args.load is not None and not args.finetune
    args.mdm_sampler_state_in_checkpoint = is_resumed and bool(
        saved.get("mdm_ppots_refit_interval")
    )
    if args.mdm_sampler_state_in_checkpoint and args.mdm_ppots_refit_interval:
        args.mdm_ppots_file = None  # the run has a density of its own by now
    # Not the name of the file, which may move, or hold something else by now.
    args.mdm_ppots_digest = (
        load_sampler(args.mdm_ppots_file).sampler().digest() if args.mdm_ppots_file else None
    )
    if not is_resumed:
        return
    bins = saved.get("mdm_ppots_bins")
    if args.mdm_sampler_state_in_checkpoint and args.mdm_ppots_refit_interval:
        if args.mdm_ppots_bins != bins:
            raise UserError(
                f"--mdm-ppots-bins {args.mdm_ppots_bins}: the measurements in the checkpoint have "
                f"{bins} bins, which cannot change; --finetune begins new ones"
            )
    if args.mdm_allow_flag_change:
        return
    ignored = "device recipe head rate_bins ema_decay allow_flag_change ppots_file".split()
    names = [f.name for f in fields(MDMConfig) if f.name.removeprefix("mdm_") not in ignored]
    if any(name.startswith("mdm_") for name in saved):  # a flag that is newer had its default
        saved = {f.name: f.default for f in fields(MDMConfig)} | saved
    changes = [
        f"{flag(name)} {getattr(args, name)} (checkpoint: {saved[name]})"
        for name in [*names, "seed", "seq_length"]
        if name in saved and saved[name] != getattr(args, name)
    ]
    # Runs that fit their own density go on with the one in the checkpoint.
    if "mdm_ppots_digest" in saved and not args.mdm_sampler_state_in_checkpoint:
        if saved["mdm_ppots_digest"] != args.mdm_ppots_digest:
            was = f"the density that {saved.get('mdm_ppots_file')} held"
            if saved["mdm_ppots_digest"] is None:
                was = "none"
            changes.append(f"--mdm-ppots-file {args.mdm_ppots_file} (checkpoint: {was})")
    if changes:
        raise UserError(
            f"the checkpoint in {args.load} was trained with other settings: {'; '.join(changes)}. "
            "Give its values, or add --mdm-allow-flag-change (or --finetune for a new run)"
        )


@contextmanager
def schedule_may_differ() -> Iterator[None]:
    """Makes a line of Megatron's assertion that a run resumes with the schedule it began with.

    Raises:
        UserError: names the flags, and those with which Megatron takes one schedule or the other.
    """
    try:
        yield
    except AssertionError as error:
        found = re.fullmatch(
            r"OptimizerParamScheduler: class input value (.*) and checkpoint ?value (.*) for (.*) "
            "do not match",
            str(error),
        )
        if not found:
            raise
        here, there, what = found.groups()
        raise UserError(
            f"the checkpoint's schedule has another {what}: {there}, here {here} (lengths in "
            "samples). Give --train-iters, --global-batch-size, --lr and the other flags of the "
            "schedule their values in the checkpoint, or add --override-opt_param-scheduler for "
            "this run's schedule or --use-checkpoint-opt_param-scheduler for the checkpoint's"
        ) from error
