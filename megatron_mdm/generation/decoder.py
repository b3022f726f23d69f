"""Decoding: fills masked positions with tokens, given a callable that computes logits.

Greedy low-confidence decoding in blocks is the published algorithm of LLaDA (arXiv 2502.09992). It
gives the same tokens. Editing is that of LLaDA2.1 (arXiv 2602.08676).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_mdm.errors import UserError
from megatron_mdm.objective.segments import counts

# Tokens int64 [B, L] -> logits float [B, n, V] of the clean tokens at the last n positions,
# unshifted. n is L, or the length of the last block if the model has blocks.
LogitsFunction = Callable[[torch.Tensor], torch.Tensor]
EDIT_STEPS = 16  # LLaDA2.1's default
Remasking = Literal["low-confidence", "random"]


@dataclass(frozen=True)
class Decoder:
    """Fills the masked positions of rows of tokens. They may be anywhere in a row.

    The masked positions of a row are filled block by block, from left to right. Every model call
    predicts all masked positions of the row's current block, keeps some of the predictions and
    leaves the other positions masked. A token that was kept never changes, except by editing
    (`edit_threshold`).

    Attributes:
        mask_token_id: id of the mask token, which is never predicted.
        steps: number of model calls that fill a row. They are divided evenly among the blocks (the
            first blocks get the remainder), and the tokens of a block evenly among its calls. A
            block never gets more calls than it has tokens. Default: one call per token.
        block_length: masked positions in a block; the last block has the remaining ones
            (semi-autoregressive decoding). Default: one block.
        block_size: positions in a block of the model (block diffusion), counted from the first
            position of a row; None: the model reads whole rows. The decoder then fills these
            blocks, and no block sees a later one. All rows are in the same block at a time, so
            that one cache of earlier blocks serves all of them.
        remasking: which predictions a call keeps: `low-confidence`: the predictions with the
            highest probability; `random`: random predictions.
        temperature: 0: take the likeliest token. Above 0: add temperature times Gumbel noise to the
            logits, in float64 (see arXiv 2409.02908), and take the token with the greatest sum.
            This samples from the softmax of logits / temperature. Confidences do not depend on
            `temperature`, `top_k` and `top_p`.
        top_k: sample only from the `top_k` likeliest tokens; lower ids win ties. Needs a
            temperature above 0.
        top_p: sample only from the likeliest tokens whose probabilities add up to at least this
            value in (0, 1], after `temperature` and `top_k`; 1: from all tokens. A value below 1
            needs a temperature above 0.
        cfg_scale: scale of classifier-free guidance (arXiv 2502.09992); 0: none. The guided logits
            are `masked + (cfg_scale + 1) * (logits - masked)`, where `masked` are the logits of the
            row with every given token masked too. Tokens and confidences come from the guided
            logits. Guidance doubles the number of model calls.
        threshold: also keep every prediction with at least this probability, in (0, 1], so that a
            row may need fewer calls (parallel decoding by confidence, arXiv 2505.22618). When a
            block is filled early, the next call starts the next block.
        edit_threshold: each call also predicts the positions of the current block that earlier
            calls filled, and replaces a token by another one that it predicts with at least this
            probability, in [0, 1] (token-to-token editing, arXiv 2602.08676). Given tokens and
            finished blocks never change. A full block is finished when a call changes nothing, or
            after `edit_steps` calls. Needs `block_size` and `threshold`. None: no editing.
        edit_steps: most calls for a block after it is full, which `steps` do not count; 0: tokens
            are replaced only while the block has masked positions. Default with `edit_threshold`:
            16.
        end_token_ids: tokens that end a row. When such a token is after the last given position
            and no position before it is masked, all masked positions become this token. The tokens
            before it are not affected. With `edit_threshold`, only a finished block ends a row.
        vocab_size: ids from `vocab_size` on are padding of the vocabulary and are never predicted.

    Raises:
        UserError: a value is out of range.
    """

    mask_token_id: int
    steps: int | None = None
    block_length: int | None = None
    block_size: int | None = None
    remasking: Remasking = "low-confidence"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    cfg_scale: float = 0.0
    threshold: float | None = None
    edit_threshold: float | None = None
    edit_steps: int | None = None
    end_token_ids: tuple[int, ...] = ()
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        """Checks every value; see Raises of the class."""
        for name in ("steps", "block_length", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        for name in ("temperature", "cfg_scale"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} must be 0 or more, got {value}")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"--top-p must lie in (0, 1], got {self.top_p}")
        if self.temperature == 0.0 and (self.top_k is not None or self.top_p < 1.0):
            name = "--top-p" if self.top_k is None else "--top-k"
            raise UserError(
                f"{name} needs a --temperature above 0: without one the likeliest token is taken"
            )
        if self.remasking not in ("low-confidence", "random"):
            raise UserError(f"--remasking is low-confidence or random, not {self.remasking}")
        if self.threshold is not None:
            if not 0.0 < self.threshold <= 1.0:
                raise UserError(f"--threshold must lie in (0, 1], got {self.threshold}")
            if self.remasking == "random":
                raise UserError("--threshold needs --remasking low-confidence: drop one of them")
        self._check_editing()
        for token in self.end_token_ids:
            if token < 0 or (self.vocab_size is not None and token >= self.vocab_size):
                raise UserError(f"--eos-token-ids {token}: the vocabulary has no such id")
        if self.mask_token_id in self.end_token_ids:
            raise UserError(f"the mask token {self.mask_token_id} cannot end a text")
        if self.block_size is not None:
            for name in ("block_length", "cfg_scale"):
                if getattr(self, name):
                    raise UserError(
                        f"--{name.replace('_', '-')} is for models that read whole rows, and this "
                        f"one has blocks of {self.block_size} tokens: leave it out"
                    )

    def _check_editing(self) -> None:
        if self.edit_threshold is None:
            if self.edit_steps is not None:
                raise UserError("--edit-steps needs an --edit-threshold: add one, or leave it out")
            return
        if not 0.0 <= self.edit_threshold <= 1.0:
            raise UserError(f"--edit-threshold must lie in [0, 1], got {self.edit_threshold}")
        if self.edit_steps is not None and self.edit_steps < 0:
            raise UserError(f"--edit-steps must be 0 or more, got {self.edit_steps}")
        if self.block_size is None:
            raise UserError(
                "--edit-threshold is for models with blocks, and this one reads whole rows: give a "
                "--block-size, or leave it out"
            )
        if self.threshold is None:
            raise UserError("--edit-threshold needs a --threshold: add one, or leave it out")

    def check_calls(self, wanted: int) -> None:
        """Checks that `steps` are enough for the blocks of a row.

        Args:
            wanted: number of masked positions of the row.

        Raises:
            UserError: there are fewer steps than blocks.
        """
        if self.block_length is not None:
            blocks = -(-wanted // self.block_length)
            self._check_steps(blocks, f"--block-length {self.block_length}")
        if self.block_size is not None:  # more, if the first block begins with given tokens
            self._check_steps(-(-wanted // self.block_size), f"{self.block_size} tokens")

    def _check_steps(self, blocks: int, size: str) -> None:
        if self.steps is not None and blocks > self.steps:
            raise UserError(
                f"--steps {self.steps} is less than one per block: {blocks} blocks of {size} have "
                "to be filled"
            )

    def __call__(
        self,
        logits: LogitsFunction,
        tokens: torch.Tensor,
        generators: Sequence[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """Decodes and returns the last of `states`: int64 [B, L] without mask tokens."""
        for state in self.states(logits, tokens, generators):
            tokens = state
        return tokens

    @torch.no_grad()
    def states(
        self,
        logits: LogitsFunction,
        tokens: torch.Tensor,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Iterator[torch.Tensor]:
        """Decodes call by call.

        Args:
            logits: see `LogitsFunction`. With `block_size` it gets the tokens up to the end of the
                current block. No block before it has a masked position, or changes later, also with
                `edit_threshold`.
            tokens: int64 [B, L], with the mask token at positions to fill; other tokens are kept.
            generators: random generators, one per row, on the device of `tokens`, so that a row
                does not depend on the other rows; default: torch's default generator.

        Yields:
            int64 [B, L]: `tokens`, then the rows after each model call. Finished rows stay as they
            are.

        Raises:
            UserError: a row has fewer steps than blocks, or logits are not finite.
        """
        masked = tokens == self.mask_token_id
        wanted = masked.sum(dim=1)
        block_of = self._block_numbers(masked)
        sizes = counts(masked, block_of)  # masked positions in each block
        blocks = (sizes > 0).sum(dim=1)
        self.check_calls(max(wanted.tolist(), default=0))
        if self.block_size is not None:
            self._check_steps(max(blocks.tolist(), default=0), f"{self.block_size} tokens")
        given = ~masked
        after_given = masked.flip(1).cumprod(dim=1).flip(1).bool()
        block = torch.full_like(wanted, -1)
        call = torch.zeros_like(wanted)
        edits = torch.zeros_like(wanted)  # calls since the row's block is full
        unfinished = masked  # positions whose tokens may still change
        yield tokens
        while unfinished.any():
            leftmost = unfinished.int().argmax(dim=1)
            next_block = block_of.gather(1, leftmost[:, None])[:, 0]
            candidates, end = unfinished & (block_of == next_block[:, None]), tokens.shape[1]
            if self.block_size is not None:
                first = int(leftmost[unfinished.any(dim=1)].min())
                start = first // self.block_size * self.block_size
                end = min(end, start + self.block_size)
                candidates[:, end:] = False
            # A row whose next block is not the current one waits.
            waits = ~candidates.any(dim=1)
            call = torch.where(waits, call, torch.where(next_block == block, call + 1, 0))
            block = torch.where(waits, block, next_block)  # `call` counts within it
            scores = self._scores(logits, tokens, candidates, given, end)
            prediction, confidence = self._predict(scores, candidates, generators)

            size = sizes.gather(1, block.clamp(min=0)[:, None])[:, 0]
            calls = size
            if self.steps is not None:
                share = blocks.clamp(min=1)  # no division by 0 in a row without masked positions
                calls = self.steps // share + (block < self.steps % share)
            calls = calls.clamp(min=1)
            count = size // calls + (call < size % calls)
            to_fill = candidates & masked
            order = confidence.masked_fill(~to_fill, -torch.inf)
            rank = order.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            keep = rank < count[:, None]
            if self.threshold is not None:
                keep = keep | (confidence >= self.threshold)
            changes = to_fill & keep
            finished = ~waits
            if self.edit_threshold is not None:
                replaced = candidates & ~masked & (prediction != tokens)
                changes |= replaced & (confidence >= self.edit_threshold)
                edits = torch.where(waits | to_fill.any(dim=1), 0, edits + 1)
                most = EDIT_STEPS if self.edit_steps is None else self.edit_steps
                is_full = ~(to_fill & ~changes).any(dim=1)
                is_stable = (edits > 0) & ~changes.any(dim=1)
                finished &= is_full & (is_stable | (edits >= most))
            tokens = torch.where(changes, prediction, tokens)
            if self.end_token_ids:
                ended = self._end(tokens, after_given)
                tokens = torch.where(finished[:, None], ended, tokens)
            masked = tokens == self.mask_token_id
            # Without editing, a token that was kept is final at once.
            final = ~masked if self.edit_threshold is None else ~masked & finished[:, None]
            unfinished = unfinished & ~final
            yield tokens

    def _block_numbers(self, masked: torch.Tensor) -> torch.Tensor:
        """The number of each masked position's block among those to fill in its row, int64 [B, L].

        Args:
            masked: bool [B, L].
        """
        if self.block_size is not None:
            places = torch.arange(masked.shape[1], device=masked.device).expand_as(masked)
            block = places // self.block_size
            number = (counts(masked, block) > 0).cumsum(dim=1) - 1
            return number.clamp(min=0).gather(1, block)
        length = masked.sum(dim=1).clamp(min=1)
        if self.block_length is not None:
            length = torch.full_like(length, self.block_length)
        ordinal = masked.cumsum(dim=1) - 1
        return ordinal.clamp(min=0) // length[:, None]

    def _scores(
        self,
        logits: LogitsFunction,
        tokens: torch.Tensor,
        candidates: torch.Tensor,
        given: torch.Tensor,
        end: int,
    ) -> torch.Tensor:
        """The guided logits of the N candidate positions, row after row, float64 [N, V].

        No candidate is at `end` or after it.
        """
        scores = logits(tokens[:, :end])
        scores = scores[candidates[:, end - scores.shape[1] : end]].double()
        if self.cfg_scale == 0.0:
            return scores
        hidden = tokens.masked_fill(given, self.mask_token_id)
        masked = logits(hidden)[candidates].double()
        guided = masked + (self.cfg_scale + 1.0) * (scores - masked)
        return torch.where(scores == masked, scores, guided)  # keeps -inf if both are -inf

    def _predict(
        self,
        scores: torch.Tensor,
        candidates: torch.Tensor,
        generators: Sequence[torch.Generator] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted tokens (int64 [B, L]) and their confidences (float64 [B, L]) at candidates."""
        probabilities = scores.softmax(dim=-1)
        scores[:, self.mask_token_id] = -torch.inf
        if self.vocab_size is not None:
            scores[:, self.vocab_size :] = -torch.inf

        def uniforms(*shape: int) -> torch.Tensor:
            counts = candidates.sum(dim=1).tolist()
            sources: Sequence[torch.Generator | None] = generators or [None] * len(counts)
            parts = [
                torch.rand(n, *shape, dtype=scores.dtype, device=scores.device, generator=source)
                for n, source in zip(counts, sources, strict=True)
            ]
            return torch.cat(parts)

        if self.top_k is not None or self.top_p < 1.0:
            scores = self._likeliest(scores)
        if self.temperature > 0:
            # LLaDA maximises exp(logit) / (-log u)^temperature; this is its logarithm.
            scores -= self.temperature * uniforms(scores.shape[1]).log_().neg_().log_()
        picks = scores.argmax(dim=-1)
        order = probabilities.gather(-1, picks[:, None])[:, 0]
        if order.isnan().any():  # a single NaN or +inf among the logits makes the softmax NaN
            raise UserError("the model's logits hold NaN or infinity: decoding is not possible")
        if self.remasking == "random":
            order = uniforms()
        prediction = torch.zeros_like(candidates, dtype=torch.int64)
        confidence = torch.full_like(candidates, -torch.inf, dtype=scores.dtype)
        prediction[candidates], confidence[candidates] = picks, order
        return prediction, confidence

    def _likeliest(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [N, V] with -inf for the tokens that `top_k` and `top_p` exclude."""
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            ordered[:, self.top_k :] = -torch.inf
        if self.top_p < 1.0:
            probabilities = (ordered / self.temperature).softmax(dim=-1)
            likelier = probabilities.cumsum(dim=-1) - probabilities
            ordered = ordered.masked_fill(likelier >= self.top_p, -torch.inf)
        return torch.empty_like(scores).scatter_(-1, order, ordered)

    def _end(self, tokens: torch.Tensor, after_given: torch.Tensor) -> torch.Tensor:
        """Fills masked positions with the end token, in rows that have ended; see the class."""
        masked = tokens == self.mask_token_id
        ends = torch.isin(tokens, torch.tensor(self.end_token_ids, device=tokens.device))
        ends &= after_given & (masked.cumsum(dim=1) == 0)
        token = tokens.gather(1, ends.int().argmax(dim=1)[:, None])
        return torch.where(masked & ends.any(dim=1)[:, None], token, tokens)


def filling_order(states: Sequence[torch.Tensor], mask_token_id: int) -> torch.Tensor:
    """Number of the model call that filled each position.

    Args:
        states: everything that `Decoder.states` yielded: n + 1 tensors int64 [B, L].
        mask_token_id: id of the mask token.

    Returns:
        int64 [B, L]: 1 to n; 0 for given positions.
    """
    return torch.stack([state == mask_token_id for state in states]).sum(dim=0)
