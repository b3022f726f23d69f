"""The parts of the training state that checkpoints carry beside the weights."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_mdm.mcore.checkpoint.carried_state import CarriedState
from megatron_mdm.mcore.training.ppots import OnlineSampler
from megatron_mdm.mcore.training.state import TrainingState
from megatron_mdm.objective.ppots.state import PpotsState


def carried_states(
    state: TrainingState, config: Any, vp_stage: int | None
) -> dict[str, CarriedState]:
    """The modules that a stage of the model has for them, by attribute.

    Args:
        state: of the run.
        config: Megatron's transformer configuration.
        vp_stage: virtual pipeline stage.
    """
    carried: dict[str, CarriedState] = {}
    if state.sampler is not None:
        carried["mdm_sampler"] = SamplerState(state, config, vp_stage, state.sampler)
    if not state.only_evaluates:
        carried["mdm_logs"] = LogState(state, config, vp_stage)
    return carried


class SamplerState(CarriedState):
    """Carries the state of the online sampler."""

    KEY = "mdm_sampler_state"

    run: TrainingState

    def __init__(
        self, run: TrainingState, config: Any, vp_stage: int | None, sampler: OnlineSampler
    ) -> None:
        self.sampler = sampler
        super().__init__(run, config, vp_stage, run.sampler_state_in_checkpoint)

    def vector(self) -> npt.NDArray[np.int64]:
        """See `PpotsState.state_vector`."""
        return self.sampler.state.state_vector()

    def gather(self) -> None:
        """Takes in what all ranks have measured."""
        self.sampler.reduce()

    def restore(self, vector: npt.NDArray[np.int64]) -> None:
        """Goes on from a checkpoint.

        Raises:
            UserError: the state is damaged, or of more rows than the run has trained on.
        """
        mdm = self.run.mdm
        documents = self.run.seq_length if mdm.rate_per == "document" else 1
        self.sampler.state = PpotsState.from_state_vector(
            vector, mdm.ppots_bins, self.run.consumed_rows * documents
        )


class LogState(CarriedState):
    """Carries the control variate of the last rank, which logs.

    The sums of a log interval that has only begun are not kept: its line, after a resume, is of the
    rows since then.
    """

    KEY = "mdm_log_state"

    def __init__(self, run: TrainingState, config: Any, vp_stage: int | None) -> None:
        self.control_variate = run.control_variate
        super().__init__(run, config, vp_stage, run.log_state_in_checkpoint)

    def vector(self) -> npt.NDArray[np.int64]:
        """The average loss of each rate bin; NaN where there is none yet."""
        baseline = np.full(self.control_variate.num_bins, np.nan)
        if self.control_variate.baseline is not None:
            baseline = self.control_variate.baseline.copy()
        return baseline.view(np.int64)

    def gather(self) -> None:
        """Tells all ranks the average of the last one."""
        last = torch.distributed.get_world_size() - 1
        bits = torch.from_numpy(self.vector()).to(torch.cuda.current_device())
        torch.distributed.broadcast(bits, src=last)
        self.restore(bits.cpu().numpy())

    def restore(self, vector: npt.NDArray[np.int64]) -> None:
        """Goes on from a checkpoint."""
        baseline = vector.view(np.float64).copy()
        self.control_variate.baseline = None if np.isnan(baseline).any() else baseline
