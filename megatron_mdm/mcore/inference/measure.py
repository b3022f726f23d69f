"""Measures a checkpoint: second moments per rate, for P-POTS (arXiv 2511.18159), and gradients.

The training run is not affected: the model is a separate copy, loaded from the checkpoint in
evaluation mode, so FP8 scales and optimizer state do not change.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from megatron.core import mpu

from megatron_mdm.evaluation.nelbo import ScoredRow
from megatron_mdm.mcore.data.batch import Batch
from megatron_mdm.mcore.data.row_dataset import RowDataset, build_datasets
from megatron_mdm.mcore.flags.arguments import check_data
from megatron_mdm.mcore.inference.loaded_model import LoadedModel
from megatron_mdm.mcore.model.inputs import ModelInputs, logits_to_tokens
from megatron_mdm.mcore.model.masked_head import head
from megatron_mdm.mcore.training.micro_batch import MicroBatch
from megatron_mdm.objective.corruption import Corruption
from megatron_mdm.objective.loss import row_losses
from megatron_mdm.objective.ppots.exact_sums import from_limbs
from megatron_mdm.objective.ppots.moments import RateMoments, TextMoments, accumulate
from megatron_mdm.objective.quantiles import Quantiles
from megatron_mdm.objective.randomness import GRID_BITS, Split, row_uniforms
from megatron_mdm.objective.rate_bins import mask_for_bins
from megatron_mdm.objective.segments import totals
from megatron_mdm.variance.report import CausalStep, Step
from megatron_mdm.variance.sketch import Sketch, gradients


def measure(
    loaded: LoadedModel,
    target: Literal["loss", "gradient"],
    num_bins: int,
    num_rows: int,
    masks_per_bin: int,
    micro_batch_size: int = 16,
) -> Iterator[tuple[int, int, TextMoments]]:
    """Measures E[value^2 | t in a bin] over rows of the training data and fresh masks.

    The number of masked tokens of each mask is drawn first (objective/rate_bins.py).

    Args:
        loaded: the model.
        target: the value of a row, or of a document with --mdm-rate-per document: its loss l (nats
            per eligible token), or the norm of dl/dh, where h are the final hidden states. Values
            are weighted as in training.
        num_bins: number of equal bins of t. The draws of a bin are stratified over its numbers of
            masked tokens.
        num_rows: number of rows of the training data.
        masks_per_bin: number of draws for each row in each bin.
        micro_batch_size: number of draws in one call of the model.

    Returns:
        Iterator of (draws done, draws in total, moments of each row so far); the last item is
        complete. Only the second moments are valid; the first moments are not those of the value.

    Raises:
        UserError: the data cannot be trained on.
    """
    args = loaded.args
    args.mdm_data, args.mdm_tokenizer = check_data(args)  # at the call, before the iterator starts
    dataset = build_datasets(args, loaded.mdm, [num_rows, 0, 0], on_all_ranks=True)[0]
    assert dataset is not None  # since it is on all ranks
    return _measure(loaded, dataset, target, num_bins, num_rows, masks_per_bin, micro_batch_size)


def _measure(
    loaded: LoadedModel,
    dataset: RowDataset,
    target: Literal["loss", "gradient"],
    num_bins: int,
    num_rows: int,
    masks_per_bin: int,
    micro_batch_size: int,
) -> Iterator[tuple[int, int, TextMoments]]:
    args = loaded.args
    mdm, eod_id = dataset.mdm, loaded.tokenizer.eod
    draws_per_row = num_bins * masks_per_bin
    total = num_rows * draws_per_row
    # Each row goes through all bins; with rates per document, each document starts at a different
    # bin. Within a bin, the lattice selects the number of masked tokens, shifted (modulo 1) by a
    # different offset for each bin.
    lattice = Quantiles("lattice", args.seed, Split.TEST)
    turns = torch.tensor([lattice(total + index) for index in range(num_bins)])
    texts = tuple(RateMoments(num_bins) for _ in range(num_rows))
    device = torch.cuda.current_device()
    for first in range(0, total, micro_batch_size):
        draws = range(first, min(first + micro_batch_size, total))
        batch = Batch.of_rows([dataset[draw // draws_per_row] for draw in draws], mdm, eod_id)
        uniforms = [row_uniforms(args.seed, Split.TEST, draw, args.seq_length) for draw in draws]
        batch = replace(batch, uniforms=torch.from_numpy(np.stack(uniforms)))
        numbers, places = (
            torch.tensor(values).view(-1, *[1] * (batch.quantile.dim() - 1))
            for values in (list(draws), [lattice(draw // num_bins) for draw in draws])
        )
        bins = (numbers + (batch.quantile * num_bins >> GRID_BITS)) % num_bins
        places = places + turns[bins] & 2**GRID_BITS - 1
        on_device = bins.to(device), places.to(device)
        values = _draw(loaded, batch.to(device), target, num_bins, *on_device)
        for text in sorted({draw // draws_per_row for draw in draws}):
            own = torch.tensor([draw // draws_per_row == text for draw in draws], device=device)
            t, value, present = values
            present = None if present is None else present[own]
            sums = accumulate(t[own], value[own], torch.ones_like(t[own]), num_bins, present)
            texts[text].add(from_limbs(sums.cpu()))
        yield draws.stop, total, TextMoments(texts)


class ParallelSketch(Sketch):
    """A sketch of the whole gradient on every tensor-parallel rank.

    All ranks add their shards of sharded parameters. Replicated parameters count once, on the first
    rank.

    Args:
        parameters: this rank's parameters.
        size: see `Sketch`.
        seed: see `Sketch`.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], size: int | None, seed: int = 0):
        self.group = mpu.get_tensor_model_parallel_group()
        rank, ranks = mpu.get_tensor_model_parallel_rank(), self.group.size()
        self.counted = [not rank or getattr(p, "tensor_model_parallel", False) for p in parameters]
        own = [p for p, counted in zip(parameters, self.counted, strict=True) if counted]
        super().__init__(own, size, seed + (rank << 32))  # another projection on each rank
        self.parameters = parameters
        counts = torch.zeros(ranks, dtype=torch.int64, device=torch.cuda.current_device())
        counts[rank] = sum(p.numel() for p in own)
        torch.distributed.all_reduce(counts, group=self.group)
        self.count = int(counts.sum())
        self._first = int(counts[:rank].sum())  # offset of this rank's part in the whole gradient

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """See `Sketch.gradient`; a collective call."""
        # Every rank needs all of its gradients, so that all ranks run the same collectives in the
        # backward pass.
        return self.project(gradients(loss, self.parameters))

    def project(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """See `Sketch.project`; `parts` are gradients of all own parameters; a collective call."""
        part = self._sums([g for g, own in zip(parts, self.counted, strict=True) if own])
        whole = part.to(parts[0].device)
        if self.size is None:
            whole = parts[0].new_zeros(self.count, dtype=torch.float32)
            whole[self._first : self._first + len(part)] = part
        torch.distributed.all_reduce(whole, group=self.group)
        return whole.cpu()


def gradient_step(loaded: LoadedModel, sketch: Sketch) -> Step:
    """A function for the mean loss of a text's masked rows and its gradient, equal on all ranks.

    Args:
        loaded: the model.
        sketch: sketch of the gradient with respect to its parameters.
    """
    device = torch.cuda.current_device()
    at_head: list[torch.Tensor] = []

    def look_and_head(hidden_states: torch.Tensor, **rest: Any) -> torch.Tensor:
        at_head[:] = [hidden_states]
        return head(hidden_states, **rest)

    def step(text: ScoredRow, corruption: Corruption) -> tuple[float, torch.Tensor, float]:
        views = len(corruption.tokens)
        inputs, eligible = _text_inputs(loaded, text, views)
        tokens, mask, weight = (
            x.to(device) for x in (corruption.tokens, corruption.mask, corruption.weight)
        )
        cross_entropy = inputs.cross_entropy(loaded.model, tokens, mask, processor=look_and_head)
        cross_entropy = logits_to_tokens(cross_entropy, inputs.shift, inputs.blocks)
        losses = row_losses(cross_entropy, mask, weight, eligible.sum(dim=1), "rows")
        loss = losses.numerator / views
        return float(loss.detach()), *sketch.gradient_and_norm(loss, at_head[0])

    return step


def causal_step(loaded: LoadedModel, sketch: Sketch) -> CausalStep:
    """A function for a text's next-token loss under a causal mask, and its gradient.

    The loss is the mean cross entropy of the eligible tokens, in nats per token. It leaves out the
    first token of each document, which no position predicts.

    Args:
        loaded: the model, which runs with a causal mask.
        sketch: sketch of the gradient with respect to its parameters.
    """

    def step(text: ScoredRow) -> tuple[float, torch.Tensor]:
        inputs, eligible = _text_inputs(loaded, text, 1, causal=True)
        able = eligible & (inputs.position_ids > 0)
        cross_entropy = inputs.cross_entropy(loaded.model, inputs.clean)
        values = logits_to_tokens(cross_entropy, inputs.shift)
        losses = row_losses(values, able, torch.ones_like(values), able.sum(dim=1), "rows")
        return float(losses.numerator.detach()), sketch.gradient(losses.numerator)

    return step


def _text_inputs(
    loaded: LoadedModel, text: ScoredRow, views: int, causal: bool = False
) -> tuple[ModelInputs, torch.Tensor]:
    """The model inputs of a text, repeated `views` times, and its eligible tokens [views, s].

    Both are on the device.
    """
    device = torch.cuda.current_device()
    clean, eligible = (x.to(device).expand(views, -1) for x in (text.tokens, text.eligible))
    documents = text.documents
    if documents is not None:
        documents = documents.to(device).expand(views, -1)
    mdm, eod_id = loaded.mdm, loaded.tokenizer.eod
    if loaded.block_size is not None and not causal:
        of_text = torch.zeros_like(clean[:1]) if documents is None else documents[:1]
        rows = loaded.block_rows(of_text, views)
        return ModelInputs.of_blocks(clean[:1], rows, mdm, eod_id, loaded.model), eligible
    inputs = ModelInputs.of_tokens(clean, documents, mdm, eod_id, loaded.model, causal=causal)
    return inputs, eligible


def _draw(
    loaded: LoadedModel,
    batch: Batch,
    target: Literal["loss", "gradient"],
    num_bins: int,
    bins: torch.Tensor,
    places: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rate t, value and presence of each row or document in a micro-batch; see `accumulate`.

    For `bins` and `places` see `mask_for_bins`.
    """
    mdm = batch.mdm
    # The kind of mask that the run trains with, but without ISAD.
    corruption = mask_for_bins(
        batch.tokens,
        batch.eligible,
        batch.uniforms,
        bins,
        places,
        batch.rate_segments,
        num_bins=num_bins,
        mask_kind=mdm.mask,
        mask_token_id=loaded.mask_token_id,
        eps=mdm.eps,
        target=target,
    )
    micro_batch = MicroBatch(batch, corruption)

    def value(hidden_states: torch.Tensor, **rest: Any) -> torch.Tensor:
        """Replaces `head`: the loss, or the gradient norm at the final hidden states [s, b, h]."""
        with torch.enable_grad():
            hidden = hidden_states.detach().requires_grad_()
            cross_entropy = logits_to_tokens(head(hidden, **rest), mdm.shift)
            losses = micro_batch.losses(cross_entropy, "rows")
            if target == "loss":
                return losses.per_row.detach()
            (gradient,) = torch.autograd.grad(losses.numerator, hidden)
            squares = gradient.float().square().sum(dim=2).transpose(0, 1)
            return totals(logits_to_tokens(squares, mdm.shift), batch.rate_segments).sqrt()

    inputs = ModelInputs.of_batch(batch, loaded.model)
    with torch.no_grad():
        values = inputs.cross_entropy(
            loaded.model, corruption.tokens, corruption.mask, processor=value
        )
    return corruption.t, micro_batch.contribution_to_batch_loss(values), micro_batch.present
