"""P-POTS while training: measure, reduce, refit equally on every rank, and resume bit for bit.

The losses of rows, or the norms of their gradients at the final hidden states, are squared and
summed per rate bin on the device, without an extra pass. Every --mdm-ppots-refit-interval
iterations, one all-reduce over the data-parallel ranks of the last pipeline stage adds 4 bins + 1
exact sums of 32 bytes (objective/ppots/exact_sums.py; 3872 bytes at 30 bins). A broadcast of the
same size sends them to the other tensor ranks and stages. All ranks then have the same numbers and
fit the same density. A checkpoint between two fits also holds the sums of all ranks; saving it
changes no bit of the next fit.
"""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core import mpu
from megatron.core.rerun_state_machine import get_rerun_state_machine

from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.model.context_parallel import is_first_cp_rank, sum_over_cp_ranks
from megatron_mdm.mcore.ranks import equal_on_all_ranks
from megatron_mdm.mcore.training.micro_batch import MicroBatch
from megatron_mdm.objective.ppots.fit import FitError, PpotsFit, fit
from megatron_mdm.objective.ppots.fit_file import load_sampler
from megatron_mdm.objective.ppots.moments import accumulate
from megatron_mdm.objective.ppots.state import PpotsState
from megatron_mdm.objective.samplers import PiecewiseSampler
from megatron_mdm.objective.segments import totals


class OnlineSampler:
    """The density in use, and the measurements for its next fit.

    Call `follow_reruns` once Megatron's rerun machine exists, so that a repeated iteration also
    restores this state.

    Args:
        mdm: settings of the objective.
        seq_length: tokens in a row.
    """

    def __init__(self, mdm: MDMConfig, seq_length: int) -> None:
        self.mdm = mdm
        self.eps = mdm.least_masked_fraction(seq_length)
        start = mdm.ppots_file
        sampler = load_sampler(start).sampler() if start else PiecewiseSampler([0, 1], [1, 1])
        self.state = PpotsState.start(sampler, mdm.ppots_bins)
        self.pending: torch.Tensor | None = None
        self.measured: torch.Tensor | None = None
        self.iteration = -1

    def record_losses(self, micro_batch: MicroBatch, losses: torch.Tensor) -> None:
        """Records the losses of rows or documents if --mdm-ppots-target is `loss`.

        Args:
            micro_batch: rows of training and their masks.
            losses: losses times their importance weight, nats per eligible token, [b] or [b, s].
        """
        if self.mdm.ppots_target == "loss":
            losses = losses / micro_batch.corruption.draw_weight
            self._record_draws(micro_batch, micro_batch.contribution_to_batch_loss(losses))

    def gradient_observer(self, micro_batch: MicroBatch) -> Callable[[torch.Tensor], None] | None:
        """The argument `on_grad_sq_norm` of `ModelInputs.cross_entropy`.

        Args:
            micro_batch: rows of training and their masks.

        Returns:
            `record_gradients` for this micro-batch if --mdm-ppots-target is `gradient`, else None.
        """
        if self.mdm.ppots_target == "gradient":
            return partial(self.record_gradients, micro_batch)
        return None

    def record_gradients(self, micro_batch: MicroBatch, squares: torch.Tensor) -> None:
        """Records ||dl/dh|| of each row or document, from the gradient of the loss sum.

        Args:
            micro_batch: rows and their masks.
            squares: squared norms of the gradient of the loss sum at the final hidden state that
                predicts each token [b, s]; 0 at the positions of other context-parallel ranks. The
                views of a block share a state and its gradient.
        """
        corruption, rows = micro_batch.corruption, micro_batch.batch.block_rows
        if rows is not None:
            weight = torch.where(corruption.mask, corruption.weight, 0.0)
            squares = squares * rows.shares_of_views(weight).square()
        norms = sum_over_cp_ranks(totals(squares, micro_batch.batch.rate_segments)).sqrt()
        value = norms / corruption.draw_weight
        if self.mdm.normalization == "tokens":  # the loss sum then consists of L_e l, not of l
            value = value / micro_batch.num_eligible.clamp(min=1)
            value = micro_batch.contribution_to_batch_loss(value)
        self._record_draws(micro_batch, value)

    def _record_draws(self, micro_batch: MicroBatch, value: torch.Tensor) -> None:
        """Records the contribution of each row, document or block to the batch loss."""
        corruption = micro_batch.corruption
        self.record(corruption.t, value, corruption.rate_weight, micro_batch.present)

    def record(
        self,
        t: torch.Tensor,
        value: torch.Tensor,
        rate_weight: torch.Tensor,
        present: torch.Tensor | None = None,
    ) -> None:
        """Adds the rows of one micro-batch on the last stage, without waiting for the device.

        Context-parallel ranks have the same rows, so only the first of them adds.

        Args:
            t: masking rates of rows [b] or documents [b, s].
            value: loss or gradient norm of each, without the importance weight.
            rate_weight: 1/q(t) of each.
            present: which entries are documents, bool [b, s]; None: all entries count.
        """
        if not is_first_cp_rank():
            return
        sums = accumulate(t, value, rate_weight, self.mdm.ppots_bins, present)
        self.pending = sums if self.pending is None else self.pending + sums

    def end_iteration(self, iteration: int) -> PpotsFit | FitError | None:
        """Adds the measurements of an iteration, and refits at the refit interval, on all ranks.

        Returns:
            The new fit; or a FitError that says why there is none (a bin without rows, for
            example), after which the run keeps its density and its measurements; or None: no refit
            is due.

        Raises:
            RuntimeError: ranks have fitted different densities.
        """
        pending, self.pending = self.pending, None
        self.iteration = iteration
        if pending is not None:
            self.measured = pending if self.measured is None else self.measured + pending
        if iteration % self.mdm.ppots_refit_interval:
            return None
        self.reduce()
        self.state.merge_pending()
        result: PpotsFit | FitError
        try:
            result = fit(
                self.state.moments,
                target=self.mdm.ppots_target,
                uniform_share=self.mdm.ppots_uniform_share,
                eps=self.eps,
            )
            self.state.sampler = result.sampler()
            self.state.moments.decay(self.mdm.ppots_decay)
        except FitError as error:
            result = error
        if not equal_on_all_ranks(self.state.sampler.digest()):
            raise RuntimeError(
                f"rank {torch.distributed.get_rank()} fitted another density of the masking rate "
                f"than others at iteration {self.iteration}: the machines compute different "
                "results, or a memory is faulty. Train with --mdm-ppots-file instead"
            )
        return result

    def reduce(self) -> None:
        """Moves the measurements of all ranks into the state of each rank; a collective call.

        Tensor-parallel ranks hold equal sums up to rounding, so only tensor rank 0 contributes to
        the all-reduce.
        """
        shape, device = self.state.pending.shape, torch.cuda.current_device()
        sums = torch.zeros(shape, dtype=torch.int64, device=device)
        if self.measured is not None:
            sums += self.measured
        self.measured = None
        last_stage = mpu.is_pipeline_last_stage(ignore_virtual=True)
        if last_stage and mpu.get_tensor_model_parallel_rank() == 0:
            group = mpu.get_data_parallel_group(with_context_parallel=True)
            torch.distributed.all_reduce(sums, group=group)
        group = mpu.get_model_parallel_group()
        if group.size() > 1:
            # Tensor ranks are contiguous in the group, and the last stage's ranks are at its end.
            adds = mpu.get_tensor_model_parallel_world_size()
            source = torch.distributed.get_process_group_ranks(group)[-adds]
            torch.distributed.broadcast(sums, src=source, group=group)
        self.state.pending += sums.cpu().numpy()

    def follow_reruns(self) -> None:
        """Saves and restores this state whenever Megatron's rerun machine does so.

        The machine repeats an iteration to validate a result. A repetition then uses the density of
        the first attempt, and its rows count once. The same holds for the checkpoint from which the
        machine repeats the iteration elsewhere.
        """
        machine = get_rerun_state_machine()
        save, restore = machine.state_save_func, machine.state_restore_func

        def save_all() -> tuple:
            others = save() if save else None
            return others, self.state.state_vector(), self.measured, self.iteration

        def restore_all(saved: tuple) -> None:
            others, state, self.measured, self.iteration = saved
            if restore:
                restore(others)
            self.state = PpotsState.from_state_vector(state, self.mdm.ppots_bins)
            self.pending = None

        machine.state_save_func, machine.state_restore_func = save_all, restore_all
