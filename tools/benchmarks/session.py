"""Runs single training steps of Megatron, for benchmarks that alternate between kinds of steps."""

import contextlib
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from megatron.training import get_timers
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.initialize import initialize_megatron
from megatron.training.training import (
    build_train_valid_test_data_iterators,
    set_startup_timestamps,
    setup_model_and_optimizer,
    train_step,
)

from megatron_mdm.mcore.data.dataset_helpers import use_shipped_dataset_helpers
from megatron_mdm.mcore.flags.arguments import parse
from megatron_mdm.mcore.training.objective import Objective, build_objective


@dataclass
class Session:
    """A model and its optimizer in training, on one rank.

    Attributes:
        args: Megatron's arguments.
        objective: the objective that `megatron_mdm.pretrain` passes to Megatron.
        model: Megatron's model chunks.
        optimizer, scheduler: Megatron's optimizer and learning-rate scheduler.
        config: the model's transformer configuration.
        iteration: number of steps taken.
    """

    args: Namespace
    objective: Objective
    model: list[Any]
    optimizer: Any
    scheduler: Any
    config: Any
    iteration: int = 0
    _forward_backward: Callable = field(default_factory=get_forward_backward_func)

    def rows(self, provider: Callable) -> Iterator:
        """Returns Megatron's loader over the training rows of a `dataset_provider`."""
        return build_train_valid_test_data_iterators(provider)[0]

    def objective_with(self, head: str = "masked", block_size: int | None = None) -> Objective:
        """Builds another objective for the same model.

        It has its own state: objectives share neither recorded sums nor a density of t.

        Args:
            head: `masked` or `full`.
            block_size: tokens in a block; None: whole rows.
        """
        self.args.mdm_head, self.args.mdm_block_size = head, block_size
        self.args.mdm_rate_per = None  # that of blocks, or of rows
        return build_objective(self.args)

    def step(self, forward_step: Callable, rows: Iterator, finalize: Callable) -> None:
        """Takes one training step of Megatron, including the optimizer.

        Args:
            forward_step: a forward step as Megatron's `pretrain` takes it.
            rows: a loader.
            finalize: Megatron's `finalize_model_grads`, or a replacement.
        """
        self.args.curr_iteration = self.iteration
        self.config.finalize_model_grads_func = finalize
        train_step(
            forward_step,
            rows,
            self.model,
            self.optimizer,
            self.scheduler,
            self.config,
            self._forward_backward,
            iteration=self.iteration,
        )
        self.iteration += 1
        self.args.consumed_train_samples += self.args.global_batch_size


@contextlib.contextmanager
def training_session(flags: list[str]) -> Iterator[Session]:
    """Makes model and optimizer as `megatron_mdm.pretrain` does with these flags, on one rank.

    Enter this context inside `training_device`, and once in a process.

    Raises:
        UserError: a flag or a combination of flags is not possible.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    sys.argv = [sys.argv[0], *flags]  # Megatron parses the command line itself
    set_startup_timestamps(program_start=time.time(), main_entry=time.time())
    use_shipped_dataset_helpers()
    args = parse()
    objective = build_objective(args)
    container = pretrain_cfg_container_from_args(args, objective.model_config)
    initialize_megatron()
    model, optimizer, scheduler = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=container,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.timers = get_timers()
    get_timers()("interval-time", log_level=0).start(barrier=True)  # read by our log line
    for chunk in model:
        chunk.train()
    try:
        yield Session(args, objective, model, optimizer, scheduler, config)
    finally:
        torch.distributed.destroy_process_group()
