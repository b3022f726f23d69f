"""Base class for numbers that checkpoints carry beside the weights, in any layout."""

from abc import abstractmethod
from typing import Any, Protocol

import torch
from megatron.core import mpu
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.transformer.module import MegatronModule

from megatron_mdm.objective.types import Integers


class Run(Protocol):
    """The part of a run's state that a carried state needs."""

    @property
    def has_begun(self) -> bool:
        """Whether the first iteration has begun: loads come before it, saves after it."""
        ...


class CarriedState(MegatronModule):
    """One int64 vector, the same on all ranks, as a module of every stage of the model.

    It is int64 because mixed precision would round floating-point buffers.

    Args:
        run: the run that the state belongs to.
        config: Megatron's transformer configuration.
        vp_stage: virtual pipeline stage.
        in_checkpoint: whether the checkpoint that is about to be loaded has such a vector.

    Attributes:
        KEY: name of the vector in checkpoints.
    """

    KEY: str

    def __init__(self, run: Run, config: Any, vp_stage: int | None, in_checkpoint: bool) -> None:
        super().__init__(config)
        self.run = run
        self.stage = mpu.get_pipeline_model_parallel_rank() * 64 + (vp_stage or 0)
        self.in_checkpoint = in_checkpoint
        self.register_buffer("bits", torch.from_numpy(self.vector()), persistent=False)

    @abstractmethod
    def vector(self) -> Integers:
        """The state of this rank as a vector of constant length."""

    @abstractmethod
    def gather(self) -> None:
        """Makes the states of all ranks equal; a collective call."""

    @abstractmethod
    def restore(self, vector: Integers) -> None:
        """Replaces the state by that of a checkpoint."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The state as one replicated tensor; a collective call."""
        if not self.run.has_begun and not self.in_checkpoint:
            return {}  # Megatron is loading a checkpoint without this state
        self.gather()
        self.bits.copy_(torch.from_numpy(self.vector()))
        group = mpu.get_data_parallel_group(with_context_parallel=True)
        replica = (self.stage, mpu.get_tensor_model_parallel_rank(), group.rank())
        tensor = ShardedTensor.from_rank_offsets(self.KEY, self.bits, replica_id=replica)
        return {f"{prefix}bits": tensor}

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *_: Any) -> None:
        """Restores the state; `load_state_dict` calls it."""
        bits = state_dict.pop(f"{prefix}bits", None)
        if bits is not None:
            self.bits.copy_(bits)
            self.restore(self.bits.cpu().numpy())
