"""One process plays one rank of a launch, with Megatron's fake process groups.

A collective call of a fake process group returns at once and leaves most buffers as they are, so
the numbers of the steps have no meaning. The rows, the masks and the rates are those of the rank.
"""

import contextlib
import os
import pkgutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import (
    get_num_microbatches,
    reconfigure_num_microbatches_calculator,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.training import pretrain, set_startup_timestamps
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.models.dist_utils import build_virtual_pipeline_stages
from torch.overrides import TorchFunctionMode

from megatron_mdm.config import MDMConfig
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.data.dataset_helpers import use_shipped_dataset_helpers
from megatron_mdm.mcore.data.row_dataset import Datasets, epochs, row_columns
from megatron_mdm.mcore.device import replaced, training_device
from megatron_mdm.mcore.flags import identities
from megatron_mdm.mcore.flags.arguments import (
    check_flags_of_gpus,
    megatron_errors_as_user_errors,
    parse,
    parse_only,
)
from megatron_mdm.mcore.model import hybrid, layer_specs
from megatron_mdm.mcore.model.layer_specs import make_bidirectional
from megatron_mdm.mcore.training.objective import Objective, build_objective
from megatron_mdm.rehearse.attention import use_own_positions
from megatron_mdm.rehearse.roles import Role
from megatron_mdm.rehearse.shrink import STEPS, CutRows, fewer_micro_batches, shrunk
from megatron_mdm.sizing.course import Course
from megatron_mdm.sizing.memory import Stage, bytes_of_stage
from megatron_mdm.sizing.pipeline import bubble


def play(words: Sequence[str], role: Role, given: Sequence[str] = ()) -> dict[str, Any]:
    """Plays a rank: all checks of the start, the stage at its true size, and some narrow steps.

    Call it once in a process, whose environment it changes.

    Args:
        words: flags of `for_a_cpu`.
        role: the rank.
        given: the flags of the launch. Those that `for_a_cpu` takes out are checked too.

    Returns:
        What the rank has found, in values that JSON can hold.

    Raises:
        UserError: the launch would not start.
    """
    os.environ |= {
        "RANK": str(role.rank),
        "LOCAL_RANK": str(role.rank % role.gpus),
        "WORLD_SIZE": str(role.world),
        "LOCAL_WORLD_SIZE": str(role.gpus),
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
    }
    sys.argv = ["megatron_mdm.rehearse", *words]
    with training_device("cpu"), NewMemoryIsZero(), _knows_all_files():
        set_startup_timestamps(program_start=time.time(), main_entry=time.time())
        use_shipped_dataset_helpers()
        args = parse()
        if given:
            sys.argv[1:] = given
            check_flags_of_gpus(parse_only())
        with _stand_in_attention(args):
            return _Rehearsal(args, role).run()


class _Rehearsal:
    """The true launch, and the narrow launch that takes steps."""

    def __init__(self, args: Namespace, role: Role) -> None:
        self._role = role
        self._true = Namespace(**vars(args))
        self._args = args
        self._micro_batches = get_num_microbatches()
        self._found: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        values, factor = shrunk(self._args)
        self._found |= {
            "course": asdict(Course.of(self._true)),
            "micro_batches": self._micro_batches,
            "bubble": bubble(self._true, self._micro_batches),
            "factor": factor,
            "stand_in_attention": self._true.context_parallel_size > 1,
            "positions": values["seq_length"],
        }
        vars(self._args).update(values)
        self._shorten()
        with megatron_errors_as_user_errors():
            true = build_objective(self._true)
            narrow = build_objective(self._args)
        self._look_before(narrow, true)
        container = pretrain_cfg_container_from_args(self._args, narrow.model_config)
        try:
            pretrain(
                container,
                self._provider(true),
                ModelType.encoder_or_decoder,
                narrow.forward_step,
                non_loss_data_func=narrow.after_evaluation,
            )
        except SystemExit as end:  # at --exit-interval
            if end.code:
                raise
        self._found["steps"] = self._args.curr_iteration + 1
        return self._found

    def _shorten(self) -> None:
        """Takes a few steps with few micro-batches and one evaluation; loads and saves nothing."""
        args, rows = self._args, self._args.micro_batch_size * self._args.data_parallel_size
        steps = fewer_micro_batches(args, self._micro_batches)
        self._found["rehearsed_micro_batches"] = steps
        for name in ("save", "load", "pretrained_checkpoint", "save_interval"):
            setattr(args, name, None)
        args.exit_interval, args.log_interval = STEPS, 1
        args.iteration = 0
        args.do_train = True  # else a stage without rows waits for rank 0 to say so
        if args.step_batch_size_schedule is None:
            args.global_batch_size = steps * rows
            reconfigure_num_microbatches_calculator(
                args.rank,
                global_batch_size=args.global_batch_size,
                micro_batch_size=args.micro_batch_size,
                data_parallel_size=args.data_parallel_size,
            )
        if args.eval_iters:
            args.eval_interval = STEPS
            micro = args.eval_micro_batch_size or args.micro_batch_size
            of_step = micro * args.data_parallel_size
            count = fewer_micro_batches(args, args.eval_global_batch_size // of_step)
            for each in (args, self._true):
                sizes = MDMConfig.from_args(args).evaluated_sizes
                each.eval_iters = len(sizes) * len(args.mdm_validation_sets or [None])
                each.eval_global_batch_size = count * of_step
        if args.mdm_ppots_refit_interval:
            args.mdm_ppots_refit_interval = STEPS

    def _look_before(self, narrow: Objective, true: Objective) -> None:
        """Builds the true stages, without their weights, before the narrow model starts."""
        start = narrow.model_config.before_model

        def before_model() -> None:
            self._count(true)
            start()

        narrow.model_config.before_model = before_model

    def _count(self, true: Objective) -> None:
        role, args = self._role, self._true
        place = (
            mpu.get_pipeline_model_parallel_rank(),
            mpu.get_data_parallel_rank(),
            mpu.get_context_parallel_rank(),
            mpu.get_tensor_model_parallel_rank(),
        )
        assert place == (role.stage, role.data, role.context, 0), place
        config: Any = true.model_config
        build = pkgutil.resolve_name(config.builder)(config).build_model
        groups = ProcessGroupCollection.use_mpu_process_groups()
        with torch.device("meta"):
            stages = build_virtual_pipeline_stages(
                build, groups, args.virtual_pipeline_model_parallel_size
            )
        parameters = [p for stage in stages for p in stage.parameters()]
        experts = sum(p.numel() for p in parameters if not getattr(p, "allreduce", True))
        modules = [module for stage in stages for module in stage.modules()]
        moe = sum(isinstance(module, MoELayer) for module in modules)
        layers = sum(isinstance(module, SelfAttention) for module in modules) - moe
        stage = Stage(
            sum(p.numel() for p in parameters) - experts,
            experts,
            layers,
            moe,
            mpu.is_pipeline_last_stage(ignore_virtual=True),
        )
        self._found["stage"] = asdict(stage)
        self._found["bytes"] = bytes_of_stage(args, stage, role.stage, self._micro_batches)

    def _provider(self, true: Objective) -> Any:
        """The true rows, cut to the positions of the narrow launch."""
        mdm, length = MDMConfig.from_args(self._true), self._args.seq_length

        def cut(rows: Any, training: bool) -> Any:
            return rows and CutRows(rows, row_columns(mdm, training), length)

        def provide(num_samples: list[int], vp_stage: int | None = None) -> Datasets:
            if self._true.mock_data:  # the index of so many random rows would fill the memory
                step = get_num_microbatches() * self._args.micro_batch_size
                num_samples = [(STEPS + 1) * step * self._args.data_parallel_size]
                num_samples += [0, 0]  # the provider counts rows of evaluations itself
            training, validation, test = true.datasets_provider(num_samples, vp_stage)
            if training is not None and "epochs" not in self._found and not self._true.mock_data:
                texts = -(-num_samples[0] // mdm.views)
                self._found["epochs"] = [list(part) for part in epochs(training.dataset, texts)]
            return cut(training, True), cut(validation, False), cut(test, False)

        provide.is_distributed = True  # type: ignore[attr-defined]
        return provide


class NewMemoryIsZero(TorchFunctionMode):
    """Zeros for buffers that a fake collective call does not fill; else they may hold a NaN."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.empty_like):
            found.detach().zero_()  # a buffer that requires a gradient refuses zero_
        return found


@contextlib.contextmanager
def _knows_all_files() -> Iterator[None]:
    """Context in which every rank reads the identities of the files, which rank 0 would send it."""
    with (
        replaced(identities, "is_first_rank", lambda: True),
        replaced(torch.distributed, "broadcast_object_list", lambda *_, **__: None),
    ):
        yield


@contextlib.contextmanager
def _stand_in_attention(args: Namespace) -> Iterator[None]:
    """Context in which layers can be built under context parallelism."""
    if args.context_parallel_size == 1:
        yield
        return
    name = make_bidirectional.__name__
    with replaced(layer_specs, name, use_own_positions), replaced(hybrid, name, use_own_positions):
        yield


def report(words: Sequence[str], role: Role, given: Sequence[str] = ()) -> dict[str, Any]:
    """`play`, with a refusal or a failure as its result.

    Returns:
        What `play` returns, or a dict with `refusal`, the line of a `UserError`, or `failure`, the
        first line of another exception.
    """
    try:
        return play(words, role, given)
    except UserError as error:
        return {"refusal": str(error)}
    except Exception as error:
        import traceback

        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        return {"failure": f"{type(error).__name__}: {first}"}
