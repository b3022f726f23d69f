"""The whole run in numbers: rows, operations, hours and checkpoints."""

from argparse import Namespace
from dataclasses import dataclass

from megatron_mdm.config import MDMConfig
from megatron_mdm.sizing.flops import UNKNOWN, ModelShape

MASKED = 0.5  # mean fraction of masked positions with uniform rates
PARAMETER_BYTES = 4 + 8  # float32 weight and two moments of Adam in a checkpoint


@dataclass(frozen=True)
class Course:
    """A run, from its first iteration to its last one.

    Attributes:
        iterations: iterations of the run; None if --step-batch-size-schedule changes their size.
        rows: rows of an iteration: of the last one, with --step-batch-size-schedule.
        texts: different texts among them; each has --mdm-views rows.
        tokens: positions of an iteration.
        all_rows: rows of the run.
        flops: useful operations of an iteration; None if a flag has layers that are not counted.
        checkpoint_bytes: size of a checkpoint; None if nothing is saved.
        checkpoints: number of checkpoints that stay at the end; None if nothing is saved.
    """

    iterations: int | None
    rows: int
    texts: int
    tokens: int
    all_rows: int
    flops: float | None
    checkpoint_bytes: int | None
    checkpoints: int | None

    @classmethod
    def of(cls, args: Namespace) -> "Course":
        """Reads the run from Megatron's validated arguments."""
        rows = args.global_batch_size
        if args.step_batch_size_schedule:
            rows = int(args.step_batch_size_schedule.replace(",", " ").split()[-1].split(":")[1])
        iterations = args.train_iters
        if args.train_samples is not None:
            iterations = args.train_samples // rows
        all_rows = args.train_samples or args.train_iters * rows
        tokens = rows * args.seq_length
        flops = None
        shape = ModelShape.from_args(args)
        in_blocks = MDMConfig.from_args(args).blocks is not None  # their operations are not counted
        if not in_blocks and not any(getattr(args, name) for name in UNKNOWN):
            flops = tokens * shape.training_flops(MASKED if args.mdm_head == "masked" else 1.0)
        size = kept = None
        if args.save is not None and iterations:
            weight = 2 if args.bf16 or args.fp16 else 0
            size = (weight + PARAMETER_BYTES) * shape.num_parameters
            kept = checkpoints_that_stay(iterations, args.save_interval, args.save_retain_interval)
        is_fixed = not args.step_batch_size_schedule
        return cls(
            iterations if is_fixed else None,
            rows,
            rows // args.mdm_views,
            tokens,
            all_rows,
            flops,
            size,
            kept if is_fixed else None,
        )

    def hours(self, gpus: int, mfu: float, peak_flops: float) -> float | None:
        """Hours of the run without evaluations and saves; None if they cannot be computed.

        Args:
            gpus: number of GPUs.
            mfu: assumed model FLOPs utilisation, from 0 to 1.
            peak_flops: dense peak operations per second of one GPU.
        """
        if self.flops is None:
            return None
        return self.flops * self.all_rows / self.rows / (gpus * mfu * peak_flops) / 3600


def checkpoints_that_stay(iterations: int, interval: int, retain: int | None) -> int:
    """Number of checkpoints that stay: those at multiples of `retain`, and the last one."""
    if retain is None:
        return -(-iterations // interval)
    return len({*range(retain, iterations + 1, retain), iterations})
