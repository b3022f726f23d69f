"""Checks the length of a run, its learning rates and its intervals, and refuses in one line.

Megatron checks them only after it has built the model, and ends every rank with a traceback.
"""

import math
from argparse import Namespace
from functools import lru_cache

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from megatron_mdm.config import flag
from megatron_mdm.errors import UserError

# Megatron adds rank numbers to the seed. A larger seed would overflow NumPy's generator.
MOST_SEED = 4_000_000_000


def check_schedule(args: Namespace) -> None:
    """Checks the flags for the length of a run, its intervals and its learning rates.

    Args:
        args: parsed arguments, before or after Megatron validates them.

    Raises:
        UserError: names the flag and what to do.
    """
    if not 1 <= args.seed <= MOST_SEED:
        raise UserError(f"--seed must lie in 1..{MOST_SEED}, got {args.seed}")
    _at_least(args, 1, "log_interval")
    _at_least(args, 0, "eval_iters", "num_workers")
    if args.save is not None and args.save_interval is None and not args.skip_train:
        raise UserError("--save needs --save-interval: iterations from one checkpoint to the next")
    if args.save_interval is not None:
        _at_least(args, 1, "save_interval")
    length = "train_iters" if args.train_samples is None else "train_samples"
    if getattr(args, length) is None:
        raise UserError(
            "--train-iters is missing: iterations of the whole run (or give --train-samples)"
        )
    if args.step_batch_size_schedule and args.train_samples is None:
        raise UserError(
            "--step-batch-size-schedule needs --train-samples, samples of the whole run, in the "
            "place of --train-iters"
        )
    _at_least(args, 1, length)
    if args.eval_interval is None:
        raise UserError(
            "--eval-interval is missing: iterations from one validation to the next (any number "
            "with --eval-iters 0, which turns validation off)"
        )
    _at_least(args, 1, "eval_interval")
    if not args.skip_train:
        _check_rates(args)
        _check_decay(args)


def last_step(args: Namespace) -> int:
    """Iterations, or samples with --train-samples, that are finished when the last step begins."""
    if args.train_samples is None:
        return int(args.train_iters) - 1
    rest = 0 if args.step_batch_size_schedule else args.train_samples % args.global_batch_size
    return samples_that_acted(args, args.train_samples - rest) - 1


def samples_that_acted(args: Namespace, finished: int) -> int:
    """The finished samples up to the first one of the last step.

    A step has the settings of its first sample, so a phase that starts later has not acted yet.

    Args:
        args: arguments of the run; its last step has their batch size.
        finished: number of finished samples.
    """
    schedule = args.step_batch_size_schedule
    if schedule:
        begin = _begin_of_last_step(schedule, args.seq_length, finished)
    else:
        begin = max(0, finished - args.global_batch_size)
    return min(finished, begin + 1)


@lru_cache(maxsize=1)
def _begin_of_last_step(schedule: str, seq_length: int, finished: int) -> int:
    """`finished` samples without those of the last step of --step-batch-size-schedule."""
    sizes = StepBatchsizeNumMicroBatchesCalculator(
        micro_batch_size=1,
        data_parallel_size=1,
        decrease_batch_size_if_needed=False,
        rank=1,  # the first rank would print the schedule
        schedule=schedule,
        seq_length=seq_length,
    )
    begin = end = 0
    while end < finished:
        begin = end
        sizes.update(begin, consistency_check=False)
        end += sizes.get_current_global_batch_size()
    return begin


def _at_least(args: Namespace, least: int, *names: str) -> None:
    for name in names:
        if getattr(args, name) < least:
            raise UserError(f"{flag(name)} must be at least {least}, got {getattr(args, name)}")


def _check_rates(args: Namespace) -> None:
    if args.lr is None:
        raise UserError("--lr is missing: the highest learning rate")
    for name in ("min_lr", "lr_warmup_init"):
        least = getattr(args, name)
        if not 0.0 <= least <= args.lr < math.inf:
            raise UserError(
                f"{flag(name)} {least} and --lr {args.lr}: give numbers from 0 on, of which --lr "
                "must be the largest"
            )
    for name in ("decoupled_lr", "decoupled_min_lr"):
        if not 0.0 <= (getattr(args, name) or 0.0) < math.inf:
            raise UserError(f"{flag(name)} must not be negative, got {getattr(args, name)}")
    if args.weight_decay_incr_style == "constant":
        first = last = args.weight_decay
    else:
        first, last = args.start_weight_decay, args.end_weight_decay
        if first is None or last is None:
            raise UserError(
                f"--weight-decay-incr-style {args.weight_decay_incr_style} needs "
                "--start-weight-decay and --end-weight-decay"
            )
    if not 0.0 <= first <= last < math.inf:
        raise UserError(
            f"the weight decay goes from {first} to {last}: it must be neither negative nor "
            "decreasing (--weight-decay, --start-weight-decay, --end-weight-decay)"
        )


def _check_decay(args: Namespace) -> None:
    """Checks warm-up, decay and length of the schedule against each other."""
    unit, other = ("samples", "iters") if args.train_samples is not None else ("iters", "samples")
    for name in ("lr_warmup", "lr_decay", "lr_wsd_decay"):
        if getattr(args, f"{name}_{other}"):
            raise UserError(
                f"{flag(f'{name}_{other}')} goes with --train-{other}, and this run has "
                f"--train-{unit}: give {flag(f'{name}_{unit}')}"
            )
    warmup, decay = getattr(args, f"lr_warmup_{unit}"), getattr(args, f"lr_decay_{unit}")
    length = getattr(args, f"train_{unit}") if decay is None else decay
    end = f"--train-{unit} {length}" if decay is None else f"--lr-decay-{unit} {decay}"
    if length < 1:
        raise UserError(f"--lr-decay-{unit} must be at least 1, got {length}")
    if args.lr_warmup_fraction is not None:
        if warmup:
            raise UserError(
                f"--lr-warmup-fraction and --lr-warmup-{unit} say the same: leave one of them out"
            )
        if not 0.0 <= args.lr_warmup_fraction < 1.0:
            raise UserError(f"--lr-warmup-fraction must lie in [0, 1): {args.lr_warmup_fraction}")
    elif not 0 <= warmup < length:
        raise UserError(
            f"--lr-warmup-{unit} {warmup} must lie in 0..{length - 1}: the schedule ends with {end}"
        )
    if args.lr_decay_style == "WSD":
        last = getattr(args, f"lr_wsd_decay_{unit}")
        if last is None or last < 0:
            raise UserError(
                f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}, the length of its decay, got "
                f"{last}"
            )
