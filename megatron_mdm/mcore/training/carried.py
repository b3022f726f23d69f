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
    """The modules through which a stage of the model saves these parts, by attribute name.

    Args:
        state: state of the run.
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
        """Adds the measurements of all ranks to the state."""
        self.sampler.reduce()

    def restore(self, vector: npt.NDArray[np.int64]) -> None:
        """Restores the state from a checkpoint.

        Raises:
            UserError: the state is damaged, or counts more rows than the run has trained on.
        """
        mdm = self.run.mdm
        draws = self.run.seq_length if mdm.rate_unit != "row" else 1
        self.sampler.state = PpotsState.from_state_vector(
            vector, mdm.ppots_bins, self.run.consumed_rows * draws
        )


class LogState(CarriedState):
    """Carries the control variate of the last rank, which writes the logs.

    The sums of an unfinished log interval are not saved. After a resume, the first log line covers
    only the rows since the resume.
    """

    KEY = "mdm_log_state"

    def __init__(self, run: TrainingState, config: Any, vp_stage: int | None) -> None:
        self.control_variate = run.control_variate
        super().__init__(run, config, vp_stage, run.log_state_in_checkpoint)

    def vector(self) -> npt.NDArray[np.int64]:
        """The bits of the average loss of each rate bin; NaN if there is no average yet."""
        baseline = np.full(self.control_variate.num_bins, np.nan)
        if self.control_variate.baseline is not None:
            baseline = self.control_variate.baseline.copy()
        return baseline.view(np.int64)

    def gather(self) -> None:
        """Broadcasts the averages of the last rank to all ranks."""
        last = torch.distributed.get_world_size() - 1
        bits = torch.from_numpy(self.vector()).to(torch.cuda.current_device())
        torch.distributed.broadcast(bits, src=last)
        self.restore(bits.cpu().numpy())

    def restore(self, vector: npt.NDArray[np.int64]) -> None:
        """Restores the averages from a checkpoint."""
        baseline = vector.view(np.float64).copy()
        self.control_variate.baseline = None if np.isnan(baseline).any() else baseline
