"""Calls the model: builds all of its arguments beside the masked tokens, in one place.

Training, validation, measurements, inference and the reproduction all use this module.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from megatron.core.utils import get_model_config

from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.data.batch import Batch
from megatron_mdm.mcore.data.documents import position_ids
from megatron_mdm.mcore.model.attention_mask import (
    annealed_future_positions,
    attention_mask_argument,
    block_attention_mask,
    hidden_tokens,
)
from megatron_mdm.mcore.model.causal import causal_attention
from megatron_mdm.mcore.model.context_parallel import (
    own_positions,
    sequence_parallel_part,
    shard_sequence,
    unshard_sequence,
)
from megatron_mdm.mcore.model.masked_head import HeadContext, MaskedPositions, head
from megatron_mdm.mcore.model.noisy_embeddings import noisy_embeddings
from megatron_mdm.mcore.model.repeated_positions import repeated_positions
from megatron_mdm.mcore.model.routers import shard_for_stage
from megatron_mdm.objective.blocks import BlockRows


class EmbeddingNoise(NamedTuple):
    """Noise on the embeddings of masked tokens.

    Attributes:
        std: its standard deviation.
        keys: see `noise_keys`, int64 [b, s].
        mask: masked tokens, bool [b, s].
    """

    std: float
    keys: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """The arguments of a model call for b rows of s positions. They do not depend on the masks.

    Attributes:
        clean: the tokens before masking, int64 [b, s].
        position_ids: int64 [b, s].
        attention_mask: see `attention_mask_argument`. For rows with `blocks`, the mask of this
            context-parallel rank's positions against those of the whole row, bool [g, 1, q, k], or
            with Transformer Engine its `attention_bias`.
        shift: whether a position predicts the token after it (--mdm-shift).
        past_end: positions that the losses of expert routers leave out, bool [b, s]; None: none.
        causal: whether attention is causal, for comparisons with autoregressive models.
        blocks: positions of rows that hold noisy and clean tokens; None: a position for each token.
        next_tokens: clean tokens of the next-token loss, bool [g, s], for rows with `blocks`; None:
            none.
        start: position of the first token, for a part of a text whose beginning is in a cache of
            keys and values.
    """

    clean: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    shift: bool
    past_end: torch.Tensor | None = None
    causal: bool = False
    blocks: BlockRows | None = None
    next_tokens: torch.Tensor | None = None
    start: int = 0

    @classmethod
    def of_batch(
        cls, batch: Batch, model: Any, annealing: float = 1.0, causal: bool = False
    ) -> "ModelInputs":
        """Makes the arguments for the rows of a batch.

        Args:
            batch: the rows.
            model: the stage that will be called.
            annealing: progress from causal to full attention (see `annealed_future_positions`).
            causal: whether the model runs as an autoregressive one: causal and shifted.
        """
        if batch.block_rows is not None:
            assert annealing == 1.0 and not causal
            return cls._of_batch_of_blocks(batch, batch.block_rows, model)
        return cls.of_tokens(
            batch.tokens,
            batch.attention_segments,
            batch.mdm,
            batch.eod_id,
            model,
            padding=batch.padding,
            past_end=batch.past_end if batch.mdm.random_length_fraction else None,
            visible_ahead=annealed_future_positions(batch.uniforms, annealing),
            causal=causal,
        )

    @classmethod
    def of_tokens(
        cls,
        clean: torch.Tensor,
        segments: torch.Tensor | None,
        mdm: MDMConfig,
        eod_id: int,
        model: Any,
        padding: torch.Tensor | None = None,
        past_end: torch.Tensor | None = None,
        visible_ahead: torch.Tensor | None = None,
        causal: bool = False,
    ) -> "ModelInputs":
        """Makes the arguments for any rows.

        Args:
            clean: the tokens before masking, int64 [b, s].
            segments: the parts of rows that attention stays within and that number their positions
                from 0, int64 [b, s]; None: whole rows.
            mdm: settings of the objective.
            eod_id: end-of-document token.
            model: the stage that will be called.
            padding: bool [b, s]; None: no padding.
            past_end: see the attribute.
            visible_ahead: see `dense_attention_mask`; not with `causal`.
            causal: whether the model runs as an autoregressive one: causal and shifted.
        """
        attention_mask = attention_mask_argument(
            clean,
            padding,
            eod_id,
            mdm,
            segments,
            get_model_config(model).transformer_impl,
            visible_ahead,
            causal,
        )
        positions = position_ids(clean, segments)
        return cls(clean, positions, attention_mask, mdm.shift or causal, past_end, causal)

    @classmethod
    def _of_batch_of_blocks(cls, batch: Batch, rows: BlockRows, model: Any) -> "ModelInputs":
        mdm, of_texts = batch.mdm, slice(None, None, rows.views)
        inputs = cls.of_blocks(
            batch.tokens[of_texts], rows, mdm, batch.eod_id, model, batch.padding[of_texts]
        )
        past_end = batch.past_end[of_texts] if mdm.random_length_fraction else None
        return replace(inputs, past_end=past_end, next_tokens=batch.next_tokens)

    @classmethod
    def of_blocks(
        cls,
        clean: torch.Tensor,
        rows: BlockRows,
        mdm: MDMConfig,
        eod_id: int,
        model: Any,
        padding: torch.Tensor | None = None,
    ) -> "ModelInputs":
        """Makes the arguments for rows that hold noisy and clean tokens.

        Args:
            clean: the tokens before masking, int64 [g, s].
            rows: the positions of the rows.
            mdm: settings of the objective.
            eod_id: end-of-document token.
            model: the stage that will be called.
            padding: bool [g, s]; None: no padding.
        """
        positions = rows.position_ids()
        queries = own_positions(positions.shape[1], clean.device)
        mask = rows.hidden(hidden_tokens(clean, padding, eod_id, mdm), queries)
        mask = block_attention_mask(mask, get_model_config(model))
        return cls(clean, positions, mask, mdm.shift, blocks=rows)

    def logits(self, model: Any, tokens: torch.Tensor, last: int | None = None) -> torch.Tensor:
        """Runs a stage on masked tokens; the last stage returns the logits of each position.

        Args:
            model: the stage.
            tokens: int64 [b, s].
            last: number of positions at the end that have logits; None: all.

        Returns:
            float [b, s / context-parallel ranks, V / tensor-parallel ranks], or [b, last, ...], V
            the padded vocabulary, at the last stage; else hidden states.
        """
        if last is None:
            return self._call(model, tokens)
        return self._call(
            model, tokens, output_processor=last_logits, output_processor_context=last
        )

    def cross_entropy(
        self,
        model: Any,
        tokens: torch.Tensor,
        mask: torch.Tensor | None = None,
        on_grad_sq_norm: Callable[[torch.Tensor], None] | None = None,
        processor: Callable[..., torch.Tensor] = head,
        noise: EmbeddingNoise | None = None,
        entropies: bool = False,
    ) -> torch.Tensor:
        """Runs a stage on masked tokens; the last stage returns cross entropies of clean tokens.

        Args:
            model: the stage.
            tokens: int64 [b, s].
            mask: tokens for which the head runs, bool [b, s]; the others get cross entropy 0. None:
                all tokens.
            on_grad_sq_norm: called in the backward pass with the squared norm of the gradient of
                the micro-batch's loss sum at the final hidden state that predicts each token,
                float32 [b, s], 0 at the positions of other context-parallel ranks; None: no call.
            processor: called in place of `head`, with the same arguments.
            noise: noise on embeddings; None: none.
            entropies: whether the last stage returns the entropies of right predictions too.

        Returns:
            At the last stage float [b, s / context-parallel ranks], nats, at the positions of the
            logits (see `logits_to_tokens`); with `entropies` [2, b, ...], the cross entropies and
            the entropies; else hidden states.
        """
        config = get_model_config(model)
        positions = None
        if mask is not None:
            if self.blocks is None:
                at_logits = tokens_to_logits(mask, self.shift)
            else:
                at_logits = shard_sequence(self.blocks.predicting(mask, self.next_tokens))
            positions = MaskedPositions(at_logits, *sequence_parallel_part(config))
        record = None
        if on_grad_sq_norm is not None:

            def record(squares: torch.Tensor) -> None:
                on_grad_sq_norm(logits_to_tokens(squares, self.shift, self.blocks))

        left_out = None
        if self.past_end is not None and config.num_moe_experts:
            past_end = self.past_end
            if self.blocks is not None:
                past_end = past_end.repeat_interleave(self.blocks.copies, dim=1)
            left_out = shard_for_stage(shard_sequence(past_end), model)
        if self.blocks is None:
            labels = tokens_to_logits(self.clean, self.shift)
        else:
            labels = shard_sequence(self.blocks.labels(self.clean))
        return self._call(
            model,
            tokens,
            padding_mask=left_out,
            labels=labels,
            output_processor=processor,
            output_processor_context=HeadContext(positions, record, entropies),
            noise=noise,
        )

    def _call(
        self, model: Any, tokens: torch.Tensor, noise: EmbeddingNoise | None = None, **rest: Any
    ) -> torch.Tensor:
        with contextlib.ExitStack() as stack:
            if noise is not None:
                std, keys, mask = noise
                if self.blocks is not None:  # clean copies have no masked token
                    keys, mask = (
                        self.blocks.interleave(x, torch.zeros_like(x[:: self.blocks.views]))
                        for x in (keys, mask)
                    )
                stack.enter_context(noisy_embeddings(model, std, keys, mask))
            if self.causal:
                stack.enter_context(causal_attention(model))
            copies = 1
            if self.blocks is not None:
                tokens, copies = self.blocks.interleave(tokens, self.clean), self.blocks.copies
            if copies > 1 or self.start:
                stack.enter_context(repeated_positions(model, copies, self.start))
            return model(
                shard_sequence(tokens),
                shard_sequence(self.position_ids),
                self.attention_mask,
                **rest,
            )


def last_logits(
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    scale_logits: Callable[[torch.Tensor], torch.Tensor],
    context: int,
    **_: Any,
) -> torch.Tensor:
    """Megatron's `output_processor`: the logits of the last `context` positions.

    Args:
        hidden_states: [s, b, h].
        output_layer: Megatron's output layer.
        output_weight: weight shared with the embedding, or None.
        scale_logits: GPTModel's method.
        context: Megatron's argument `output_processor_context`.

    Returns:
        float [b, context, V / tensor-parallel ranks].
    """
    logits, _bias = output_layer(hidden_states[-context:], weight=output_weight)
    return scale_logits(logits).transpose(0, 1).contiguous()


def tokens_to_logits(values: torch.Tensor, shift: bool) -> torch.Tensor:
    """Moves each token's value to the position whose logits predict it; returns this rank's part.

    With --mdm-shift these positions are one to the left. The value of the first token, which is
    never masked, moves to the last position.

    Args:
        values: one value per token, [b, s].
        shift: see `ModelInputs`.

    Returns:
        [b, s / context-parallel ranks].
    """
    return shard_sequence(values.roll(-1, dims=1) if shift else values)


def logits_to_tokens(
    values: torch.Tensor, shift: bool, blocks: BlockRows | None = None
) -> torch.Tensor:
    """The inverse of `tokens_to_logits`; tokens that other context-parallel ranks predict get 0.

    Args:
        values: one value per logits position of this rank, [b, s / context-parallel ranks].
        shift: see `ModelInputs`.
        blocks: see `ModelInputs`.

    Returns:
        [b, s].
    """
    values = unshard_sequence(values)
    if blocks is not None:
        return blocks.to_tokens(values)[0]
    return values.roll(1, dims=1) if shift else values


def logits_to_next_tokens(values: torch.Tensor, blocks: BlockRows) -> torch.Tensor:
    """Values of the next-token predictions of the clean tokens, [g, s]; see `logits_to_tokens`."""
    return blocks.to_tokens(unshard_sequence(values))[1]
