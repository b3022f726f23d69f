"""One micro-batch: rows, masked rows, model, loss; Megatron's `forward_step`."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers
from megatron.training.global_vars import get_tokenizer

from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.data.batch import load_batch
from megatron_mdm.mcore.data.row_dataset import needs_rows
from megatron_mdm.mcore.model.context_parallel import is_first_cp_rank, sum_over_cp_ranks
from megatron_mdm.mcore.model.inputs import ModelInputs, logits_to_tokens
from megatron_mdm.mcore.training.metrics import recorder
from megatron_mdm.mcore.training.micro_batch import MicroBatch
from megatron_mdm.mcore.training.nonfinite import check_finite
from megatron_mdm.mcore.training.online_sampler import OnlineSampler, online_sampler
from megatron_mdm.objective.corruption import Corrupter
from megatron_mdm.objective.ppots.fit_file import load_sampler
from megatron_mdm.objective.samplers import Clipped, RateSampler, Uniform
from megatron_mdm.objective.segments import totals


def forward_step(
    data_iterator: Iterator | None, model: Any
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple] | None]:
    """Runs one micro-batch through this pipeline stage.

    Args:
        data_iterator: of this virtual stage's RowDataset; used on tensor rank 0 only.
        model: the stage.

    Returns:
        The stage's output (at the last stage the cross entropy, float [b, s], nats) and the loss
        function that Megatron applies to it at the last stage.
    """
    args, training = get_args(), model.training
    config = MDMConfig.from_args(args)
    if not needs_rows(config, get_attr_wrapped_model(model, "vp_stage")):
        return model(None, None, None), None

    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    b = args.micro_batch_size if training else args.eval_micro_batch_size
    batch = load_batch(data_iterator, config, get_tokenizer().eod, training, b, args.seq_length)
    micro_batch = MicroBatch.of(batch, corrupter(training))
    annealed = training and config.anneal_attention_iters
    progress = args.curr_iteration / config.anneal_attention_iters if annealed else 1.0
    inputs = ModelInputs.of_batch(batch, model, progress)
    timers("batch-generator").stop()

    output = inputs.cross_entropy(
        model,
        micro_batch.corruption.tokens,
        mask=micro_batch.corruption.mask if config.head == "masked" else None,
        on_grad_sq_norm=gradient_observer(online_sampler(), micro_batch),
    )
    return output, partial(loss_func, micro_batch)


def loss_func(
    micro_batch: MicroBatch, cross_entropy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Megatron's loss function with --calculate-per-token-loss: sums over this micro-batch.

    Args:
        micro_batch: rows and their masks.
        cross_entropy: of the token that each position predicts, nats, float [b, s], or of this
            rank's part of the positions under context parallelism.

    Returns:
        Sum of weighted losses (nats), its denominator (eligible tokens or rows, int32), and the
        pair of both as `mdm loss`, which Megatron adds up over micro-batches and ranks.
    """
    check, sampler = get_args().check_for_nan_in_loss_and_grad, online_sampler()
    batch, corruption = micro_batch.batch, micro_batch.corruption
    cross_entropy = logits_to_tokens(cross_entropy, batch.config.shift)
    losses = micro_batch.losses(cross_entropy, batch.config.normalization)
    # Numerator and losses are of this rank's part of the positions, all else is of whole rows.
    denominator = losses.denominator * is_first_cp_rank()
    per_row = sum_over_cp_ranks(losses.per_row)
    # As in Megatron's own loss functions: the host waits for the loss, in each micro-batch.
    if check:
        whole_rows = per_row if per_row.dim() == 1 else per_row.sum(dim=1)
        check_finite(whole_rows, batch.row, batch.training)
    recorder(batch.training).add(
        split=batch.split,
        t=corruption.t,
        rate_weight=corruption.rate_weight,
        weight=corruption.largest_weight,
        loss=per_row,
        num_masked=micro_batch.num_masked,
        num_eligible=micro_batch.num_eligible,
        text=batch.text,
    )
    if batch.training and sampler is not None and batch.config.ppots_target == "loss":
        record(sampler, micro_batch, per_row / corruption.rate_weight)
    report = torch.stack([losses.numerator.detach(), denominator.float()])
    return losses.numerator, denominator.to(torch.int), {"mdm loss": report}


def gradient_observer(
    sampler: OnlineSampler | None, micro_batch: MicroBatch
) -> Callable[[torch.Tensor], None] | None:
    """`on_grad_sq_norm` of the model's call, where P-POTS is fitted to gradients while training."""
    batch = micro_batch.batch
    if not batch.training or sampler is None or batch.config.ppots_target != "gradient":
        return None
    return partial(record_gradients, sampler, micro_batch)


def record_gradients(
    sampler: OnlineSampler, micro_batch: MicroBatch, squares: torch.Tensor
) -> None:
    """Gives the online sampler ||dl/dh|| of each row or document, from the gradient of the sum.

    Args:
        sampler: the online sampler.
        micro_batch: rows and their masks.
        squares: squared norms of the gradient of the loss sum at the final hidden states that
            predict tokens [b, s], 0 at other context-parallel ranks' positions.
    """
    batch = micro_batch.batch
    norms = sum_over_cp_ranks(totals(squares, batch.rate_segments)).sqrt()
    value = norms / micro_batch.corruption.rate_weight
    if batch.config.normalization == "tokens":  # where the sum holds L_e l, and not l
        value = value / micro_batch.num_eligible.clamp(min=1)
    record(sampler, micro_batch, value)


def record(sampler: OnlineSampler, micro_batch: MicroBatch, value: torch.Tensor) -> None:
    """Gives the online sampler the values of rows or documents, per eligible token."""
    corruption = micro_batch.corruption
    value = micro_batch.contribution_to_batch_loss(value)
    sampler.record(corruption.t, value, corruption.rate_weight, micro_batch.present)


@lru_cache
def corrupter(training: bool) -> Corrupter:
    """What masks the rows of training, or of evaluations.

    Evaluations estimate the NELBO always alike, with uniform rates and exact-count masks, which
    have the least variance: numbers of runs that train differently can then be compared.
    """
    args = get_args()
    mdm = MDMConfig.from_args(args)
    if not training:
        return Corrupter(Uniform(), "exact-count", args.mdm_mask_token_id, mdm.eps)
    return training_corrupter(args, online_sampler() or fixed_sampler(mdm))


def training_corrupter(args: Namespace, sampler: RateSampler) -> Corrupter:
    """What masks the rows of training, with any density of t."""
    mdm = MDMConfig.from_args(args)
    return Corrupter(
        sampler=sampler,
        mask_kind=mdm.mask,
        mask_token_id=args.mdm_mask_token_id,
        eps=mdm.eps,
        isad_token_ids=tuple(mdm.isad_token_ids or ()),
        isad_delta=mdm.isad_delta,
        isad_weight=mdm.isad_weight,
    )


def fixed_sampler(mdm: MDMConfig) -> RateSampler:
    """The density of t, where the run does not fit one itself."""
    if mdm.rate_sampler == "clipped":
        return Clipped(*mdm.clip)
    if mdm.rate_sampler == "ppots":
        return load_sampler(mdm.ppots_file).sampler()
    return Uniform()
