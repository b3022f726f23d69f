"""Checks that the settings of a run agree with those of the checkpoint that it resumes."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_mdm.config import MDMConfig, destination, destinations
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.argument_groups import Group, changes, group, names
from megatron_mdm.mcore.flags.schedule import last_step, samples_that_acted
from megatron_mdm.mcore.ranks import notice
from megatron_mdm.objective.block_schedule import BlockSchedule
from megatron_mdm.objective.ppots.fit_file import load_sampler
from megatron_mdm.recipes import RECIPES

# Prefixes of the arguments that --use-checkpoint-opt_param-scheduler takes from the checkpoint.
_SCHEDULE = ("lr", "min_lr", "decoupled_", "weight_decay", "start_weight_", "end_weight_")
_UNITS = {"iters": "iterations", "samples": "samples"}

# The settings that P-POTS measurements depend on, and the bins in which they are summed.
MEASURED = (
    *("mdm_ppots_target", "mdm_ppots_bins", "mdm_normalization", "mdm_rate_per"),
    *("mdm_mask", "mdm_eps", "mdm_isad_token_ids", "mdm_isad_delta", "mdm_isad_weight"),
    "mdm_confidence_loss",  # its gradient belongs to the measured one
)

# They may change where the schedule has not begun yet.
BLOCK_SIZES = ("mdm_block_size", "mdm_block_size_schedule")


@dataclass(frozen=True)
class ResumePlan:
    """Settings that a run takes from the checkpoint that it resumes, or from its flags.

    Attributes:
        sampler_state_in_checkpoint: whether P-POTS continues with the checkpoint's measurements.
        log_state: settings under which this run saves the control variate's state; None: it saves
            no such state.
        log_state_in_checkpoint: whether the control variate continues with the checkpoint's state.
        ppots_file: file of the initial density; None: uniform, or the checkpoint's density.
        ppots_digest: digest of that density, because the file may move or change later.
        text_offset: number that is added to the number of a text, row // views.
        row_order: `epoch` or `run`, as in the flag --mdm-row-order.
        bell_fade_at: [start, end, unit]: the fade of a bell begins after `start` and is complete
            after `end` iterations or samples; the unit is "iters" or "samples". None: no bell
            fades.
    """

    sampler_state_in_checkpoint: bool
    log_state: list[Any] | None
    log_state_in_checkpoint: bool
    ppots_file: str | None
    ppots_digest: str | None
    text_offset: int
    row_order: str
    bell_fade_at: list[Any] | None

    def arguments(self) -> dict[str, Any]:
        """The plan as arguments of the run, under their names in checkpoints."""
        return {f"mdm_{name}": value for name, value in asdict(self).items()}


def plan_resume(args: Namespace, saved: dict[str, Any]) -> ResumePlan:
    """Compares the arguments with those of the checkpoint that is about to be resumed.

    Masks and rates are functions of the seed, the flags and the row number. A change of the
    objective or the data would train something else from here on, so it is refused. Changes of the
    optimisation are allowed and printed.

    Args:
        args: arguments of this run; not changed.
        saved: arguments in the checkpoint; empty if there is none.

    Raises:
        UserError: names every flag of the objective or the data that differs, if
            --mdm-allow-flag-change is missing.
    """
    is_resumed = args.load is not None and not args.finetune
    saved = _with_equal_rate_unit(args, saved)
    fits = bool(args.mdm_ppots_refit_interval and saved.get("mdm_ppots_refit_interval"))
    other = changes(args, saved, list(MEASURED)) if is_resumed and fits else []
    if is_resumed and fits and args.mdm_bell_fade not in (None, saved.get("mdm_bell_fade")):
        other.append(f"--mdm-bell-fade {args.mdm_bell_fade}")  # P-POTS begins when the fade ends
    has_sampler_state = is_resumed and fits and not other
    # Other formats save only parameters.
    is_kept = args.ckpt_format == "torch_dist"
    log_state = _log_settings(args) if is_kept else None
    before = saved.get("mdm_log_state") if is_resumed else None
    # If the checkpoint has a state, its density replaces the file's.
    file = None if has_sampler_state else args.mdm_ppots_file
    kept_order = saved.get("mdm_row_order") if is_resumed else None
    plan = ResumePlan(
        sampler_state_in_checkpoint=has_sampler_state,
        log_state=log_state,
        log_state_in_checkpoint=before is not None and before == log_state,
        ppots_file=file,
        ppots_digest=load_sampler(file).sampler().digest() if file else None,
        text_offset=_text_offset(args, saved) if is_resumed else 0,
        row_order=args.mdm_row_order or kept_order or "epoch",
        bell_fade_at=_bell_fade_at(args, saved if is_resumed else {}),
    )
    _check(Namespace(**{**vars(args), **plan.arguments()}), saved, is_resumed, other)
    if plan.bell_fade_at is not None and not args.skip_train:
        start, end, unit = plan.bell_fade_at
        notice(
            f"the bell of --mdm-rate-sampler {args.mdm_rate_sampler} fades between {start} and "
            f"{end} {_UNITS[unit]} of the run"
        )
    return plan


def _check(args: Namespace, saved: dict[str, Any], is_resumed: bool, other: list[str]) -> None:
    """Compares the final arguments with the checkpoint's; see `plan_resume`.

    Args:
        args: arguments of this run, with those of the plan.
        saved: arguments in the checkpoint.
        is_resumed: whether the run continues from the checkpoint.
        other: P-POTS settings that differ, so that the checkpoint's measurements are useless.
    """
    if not is_resumed:
        before = saved.get("mdm_mask_token_id")
        if before not in (None, args.mdm_mask_token_id):
            notice(
                f"the checkpoint was trained with mask token {before}, and this run has "
                f"{args.mdm_mask_token_id}"
            )
        return
    settings = [
        name
        for name in destinations()
        if group(name) is Group.OBJECTIVE and name not in BLOCK_SIZES
    ]
    # `check_model` lets an unshifted model begin a shifted run, as converted models do.
    settings += ["mdm_shift", *names(Group.OBJECTIVE), *names(Group.DATA)]
    found = changes(args, saved, settings)
    found += changes_of_blocks(args, saved)
    # Runs that fit their density during training continue with the one in the checkpoint.
    keeps_density = "mdm_ppots_digest" in saved and not args.mdm_sampler_state_in_checkpoint
    if keeps_density and saved["mdm_ppots_digest"] != args.mdm_ppots_digest:
        was = f"the density that {saved.get('mdm_ppots_file')} held"
        if saved["mdm_ppots_digest"] is None:
            was = "none"
        found.append(f"--mdm-ppots-file {args.mdm_ppots_file} (checkpoint: {was})")
    if found and not args.mdm_allow_flag_change:
        raise UserError(
            f"the checkpoint in {args.load} was trained with other settings: {'; '.join(found)}. "
            f"Give its values{_recipe_of(args, saved)}, or add --mdm-allow-flag-change (or "
            "--finetune for a new run)"
        )
    if other:
        notice(
            "P-POTS begins to measure anew, from the density that the flags say: the checkpoint's "
            f"measurements were made with another {'; '.join(other)}"
        )
    if saved and not args.mdm_log_state_in_checkpoint:
        notice("the controlled loss in the logs starts over: the checkpoint has no average of it")
    _say_other_order(args, saved)
    how = [] if args.skip_train else changes(args, saved, _training(args))
    for change in [*found, *how]:
        notice(f"the run resumes with another {change}")


def _recipe_of(args: Namespace, saved: Mapping[str, Any]) -> str:
    """Names the recipe that comes closest to the checkpoint's settings, if this run has another.

    The meaning of a recipe may have changed since the run began.
    """
    keys = map(destination, RECIPES.get(args.mdm_recipe, ()))
    if all(saved.get(key) == getattr(args, key) for key in keys):
        return ""

    def differing(name: str) -> int:
        settings = RECIPES[name]
        return sum(saved.get(destination(key)) != value for key, value in settings.items())

    closest = min(RECIPES, key=differing)
    by_hand = " and flags by hand" if differing(closest) else ""
    return "" if closest == args.mdm_recipe else f" (--mdm-recipe {closest}{by_hand})"


def _say_other_order(args: Namespace, saved: Mapping[str, Any]) -> None:
    """Says that a run of another length has another order of rows (--mdm-row-order run)."""
    rows, rows_before = (
        run.get("train_samples") or run.get("train_iters", 0) * run.get("global_batch_size", 0)
        for run in (vars(args), saved)
    )
    is_fixed = args.skip_train or args.mdm_sft or args.mock_data or args.mdm_row_order == "epoch"
    if not is_fixed and rows_before not in (0, rows):
        notice(
            f"the run has {rows} rows (checkpoint: {rows_before}), and --mdm-row-order run "
            "shuffles all epochs of a run together: if it takes more than one epoch, the rows from "
            "here on have another order, and some texts repeat or are missing"
        )


def changes_of_blocks(args: Namespace, saved: dict[str, Any]) -> list[str]:
    """The flags of block sizes, if the sizes of the finished part of the run would be others."""
    now, before = _finished_phases(vars(args), saved), _finished_phases(saved, saved)
    unit, unit_before = _unit(vars(args)), _unit(saved)
    if unit != unit_before:  # the starts are in other units, so only the sizes can agree
        now, before = ([(0, size) for _, size in phases] for phases in (now, before))
    if now == before:
        return []
    return changes(args, saved, BLOCK_SIZES) or [
        f"--mdm-block-size-schedule {args.mdm_block_size_schedule} in {_UNITS[unit]} (checkpoint: "
        f"in {_UNITS[unit_before]})"
    ]


def _unit(args: Mapping[str, Any]) -> str:
    """The unit in which a run counts its length and its schedules."""
    return "iters" if args.get("train_samples") is None else "samples"


def _finished_phases(
    args: Mapping[str, Any], saved: Mapping[str, Any]
) -> list[tuple[int, int | None]]:
    """The phases of block sizes that have begun before a checkpoint; see `BlockSchedule.until`.

    Args:
        args: arguments with the sizes, and the unit of their schedule.
        saved: arguments in the checkpoint.
    """
    size, schedule = (args.get(name) for name in BLOCK_SIZES)
    mdm = MDMConfig(block_size=size, block_size_schedule=schedule)
    if _unit(args) == "iters":
        finished = saved.get("iteration", 0)
    else:
        finished = samples_that_acted(Namespace(**saved), saved.get("consumed_train_samples", 0))
    return list((mdm.blocks or BlockSchedule.constant(None)).until(finished))


def _with_equal_rate_unit(args: Namespace, saved: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's arguments, with this run's --mdm-rate-per if both have acted alike.

    A whole row is one block, unless --mdm-isolate-documents divides it.
    """
    units = {args.mdm_rate_per, saved.get("mdm_rate_per")}
    if units != {"row", "block"} or args.mdm_isolate_documents:
        return saved
    if any(size is not None for _, size in _finished_phases(saved, saved)):
        return saved
    return {**saved, "mdm_rate_per": args.mdm_rate_per}


def last_block_size(args: Namespace, iteration: int | None) -> int | None:
    """Tokens in a block in the last iteration before a checkpoint; None: whole rows.

    Args:
        args: the arguments in the checkpoint.
        iteration: number of finished iterations; None for a checkpoint without a run, such as a
            converted one, which has the size that its arguments begin with.
    """
    blocks, finished = MDMConfig.from_args(args).blocks, iteration
    if blocks is None:
        return None
    if args.train_samples is not None:
        finished = samples_that_acted(args, args.consumed_train_samples)
    return blocks.last_size(finished or 0)


def _log_settings(args: Namespace) -> list[Any]:
    """The settings that the control variate's average depends on: bins, and the density of t."""
    settings = [args.mdm_rate_bins, args.mdm_clip]
    mdm = MDMConfig.from_args(args)
    # These densities are newer than the state. Other densities leave the list as it is in older
    # checkpoints.
    if mdm.bell is not None or mdm.rate_sampler == "flat":
        density = mdm.rate_sampler, mdm.logit_normal, mdm.beta
        settings += [*density, mdm.bell_uniform_share, mdm.bell_role, mdm.bell_fade]
    return settings


def _text_offset(args: Namespace, saved: dict[str, Any]) -> int:
    """The number to add to the number of a text, row // views, so that texts continue in order.

    Raises:
        UserError: the next row would not be the first view of a data row.
    """
    before, views = saved.get("mdm_views", 1), args.mdm_views
    offset, rows = saved.get("mdm_text_offset", 0), saved.get("consumed_train_samples", 0)
    if views == before:
        return int(offset)
    if rows % views:
        raise UserError(
            f"--mdm-views {views} (checkpoint: {before}): the {rows} rows that the run has trained "
            "on are not a multiple of --mdm-views, so the next row would not be the first view of "
            "a data row"
        )
    return int(offset + rows // before - rows // views)


def _bell_fade_at(args: Namespace, saved: dict[str, Any]) -> list[Any] | None:
    """The fractions of --mdm-bell-fade in iterations or samples; see `ResumePlan`.

    A run that resumes keeps its old values, even if the run has become longer. If
    --mdm-allow-flag-change allows new fractions, they refer to the whole run with its new length.
    An END that falls into the last step becomes the begin of that step.

    Raises:
        UserError: the fade leaves no step with the uniform density.
    """
    fractions = args.mdm_bell_fade
    if fractions is None:
        return None
    unit = _unit(vars(args))
    length = getattr(args, f"train_{unit}")
    last = length if args.skip_train else last_step(args)
    fade = [*(min(round(x * length), max(0, last)) for x in fractions), unit]
    if fractions == saved.get("mdm_bell_fade"):
        fade = saved["mdm_bell_fade_at"]
    _, end, its_unit = fade
    # Steps are not compared with samples, in a run that counted in the other unit when it began.
    if not args.skip_train and its_unit == unit and end > last:
        flag = f"--mdm-bell-fade {' '.join(map(str, fractions))}"
        if RECIPES.get(args.mdm_recipe, {}).get("bell_fade") == fractions:
            flag += f" of --mdm-recipe {args.mdm_recipe}"
        raise UserError(
            f"{flag}: the fade ends after {end} {_UNITS[unit]} of the run, and its last step "
            f"begins after {last}, so no step trains on the bound. Give a longer run, or a smaller "
            "END with --mdm-allow-flag-change"
        )
    return fade


def _training(args: Namespace) -> list[str]:
    """The arguments of optimisation that this run's flags determine."""
    left_out: set[str] = set()
    if args.use_checkpoint_opt_param_scheduler:
        left_out = {name for name in names(Group.TRAINING) if name.startswith(_SCHEDULE)}
    if args.weight_decay_incr_style == "constant":  # Megatron sets both to --weight-decay
        left_out |= {"start_weight_decay", "end_weight_decay"}
    if args.step_batch_size_schedule:  # Megatron then sets it to one micro-batch per rank
        left_out.add("global_batch_size")
    return [name for name in names(Group.TRAINING) if name not in left_out]
