"""Block diffusion: blocks of documents, and rows that hold the noisy and the clean tokens.

Sources: BD3-LM (arXiv 2503.09573) and the report of LLaDA2.0 (eq. 1). A document is cut into blocks
of N tokens, counted from its first token. The last block may be shorter. The tokens of a block are
predicted from the visible tokens of the block and from the clean tokens of all earlier blocks:

    L = E[ sum over blocks k of (1/t_k) sum over masked i in block k of CE(x_0^i | x_0^<k, x_t^k) ]

divided by the number of eligible tokens. One forward pass gives all blocks, if the row holds every
token twice: noisy, x_t, and clean, x_0. The attention mask then hides the clean tokens of a block
from its own noisy tokens. K views of a text share one clean copy.

The copies are interleaved: position i (K + 1) + c holds copy c of token i, the clean copy last. Any
part of the positions, as sequence and context parallelism cut them, then holds every copy of its
tokens, and the same number of masked tokens as any other part on average.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_mdm.objective.segments import begins, counts, places


def block_segments(documents: torch.Tensor, block_size: int) -> torch.Tensor:
    """Numbers of the blocks in each row, int64 [B, L]: segments (objective/segments.py).

    Args:
        documents: segments that are cut into blocks, int64 [B, L].
        block_size: tokens in a block, at least 1.
    """
    is_first = places(documents) % block_size == 0
    return is_first.long().cumsum(dim=1) - 1


def hidden_in_decoding(
    start: int, end: int, finished: int, block_size: int, causal_clean: bool = False
) -> torch.Tensor:
    """The attention mask of a text that is decoded block by block, with one copy of each token.

    Finished blocks are clean. They are followed by at most one block that is not finished, all of
    whose tokens see each other. `BlockRows.hidden` allows the same.

    Args:
        start: first position that attends.
        end: number of positions.
        finished: number of positions in finished blocks.
        block_size: tokens in a block.
        causal_clean: see `BlockRows`.

    Returns:
        bool [end - start, end], on the CPU, True = not attended to.
    """
    queries, keys = torch.arange(start, end)[:, None], torch.arange(end)
    hidden = keys // block_size > queries // block_size
    if causal_clean:
        hidden |= (keys > queries) & (queries < finished)
    return hidden


def showing_itself(hidden: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """The attention mask in which a position that would see nothing sees itself.

    Hidden scores are finite (Megatron's -10000). If all scores of a position are hidden, the
    softmax spreads its attention over every position: later ones, other documents and the clean
    tokens of its own block too.

    Args:
        hidden: True = not attended to, bool [..., Q, P].
        queries: the positions that attend, int64 [Q].

    Returns:
        bool [..., Q, P].
    """
    itself = queries[:, None] == torch.arange(hidden.shape[-1], device=hidden.device)
    return hidden & ~(itself & hidden.all(dim=-1, keepdim=True))


@dataclass(frozen=True, eq=False)
class BlockRows:
    """The positions of G texts with K views: one model row of (K + 1) L positions for each text.

    The batch has B = G K rows. Rows K g to K g + K - 1 are the views of text g. They have the same
    tokens, documents and blocks.

    Attributes:
        documents: documents of each text, int64 [G, L].
        block_size: tokens in a block.
        views: K.
        shift: whether the logits of a token predict the next one. The first token of a block is
            then predicted by the CLEAN copy of the token before it, which the block sees; the
            others by their own view's copy. The first token of a document is not predicted.
        shift_first_noisy: with `shift`, the first token of a block is predicted by the noisy copy
            of the token before it, which belongs to another block (Fast-dLLM v2 trains so).
        causal_clean: clean tokens see only clean tokens up to their own position, and not the rest
            of their block. A next-token loss on the clean copy needs this.
    """

    documents: torch.Tensor
    block_size: int
    views: int = 1
    shift: bool = False
    shift_first_noisy: bool = False
    causal_clean: bool = False

    @property
    def copies(self) -> int:
        """Positions of each token: K noisy ones and a clean one."""
        return self.views + 1

    @cached_property
    def blocks(self) -> torch.Tensor:
        """Blocks of each text, int64 [G, L]."""
        return block_segments(self.documents, self.block_size)

    @cached_property
    def _reads_clean(self) -> torch.Tensor:
        """Tokens that the clean copy of the token before them predicts, bool [G, 1, L]."""
        if not self.shift or self.shift_first_noisy:
            return torch.zeros_like(self.blocks, dtype=torch.bool)[:, None]
        return begins(self.blocks)[:, None]

    def interleave(self, noisy: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """Gives each position its value: [G, (K + 1) L].

        Args:
            noisy: one value per token of each view, [B, L].
            clean: one value per token of each text, [G, L], of the same dtype.
        """
        G, L = clean.shape
        copies = torch.cat([noisy.view(G, self.views, L), clean[:, None]], dim=1)
        return copies.transpose(1, 2).reshape(G, -1)

    def separate(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of `interleave`: values of the noisy copies [B, L] and the clean one [G, L].

        Args:
            values: one value per position, [G, (K + 1) L], or a vector, [G, (K + 1) L, V].
        """
        copies = values.unflatten(1, (-1, self.copies)).transpose(1, 2)
        return copies[:, :-1].flatten(0, 1), copies[:, -1]

    def position_ids(self) -> torch.Tensor:
        """The place of each position's token in its document, int64 [G, (K + 1) L]."""
        return places(self.documents).repeat_interleave(self.copies, dim=1)

    def hidden(
        self, hidden_tokens: torch.Tensor | None = None, queries: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The attention mask: which position (last) another one does not attend to.

        A noisy position sees the positions of its view in its block, and clean positions of
        earlier blocks of its document. A clean position sees clean positions of its document, up
        to its block or, with `causal_clean`, up to itself. It never sees noisy ones.

        Args:
            hidden_tokens: tokens that no position attends to, bool [G, L], except a position that
                sees nothing else and so itself; None: none.
            queries: the positions whose attention the mask describes, int64 [Q]; None: all of them.

        Returns:
            bool [G, 1, Q, (K + 1) L], True = not attended to.
        """
        documents, blocks = (
            x.repeat_interleave(self.copies, dim=1) for x in (self.documents, self.blocks)
        )
        position = torch.arange(documents.shape[1], device=documents.device)
        copy, token = position % self.copies, position // self.copies
        is_clean = copy == self.views
        at = position if queries is None else queries
        # Queries are rows and keys are columns of the last two dimensions.
        same_block = blocks[:, at, None] == blocks[:, None, :]
        earlier = blocks[:, at, None] > blocks[:, None, :]
        to_noisy = same_block & (copy[at, None] == copy)
        past = token[at, None] >= token if self.causal_clean else earlier | same_block
        to_clean = torch.where(is_clean[at, None], past, earlier)
        seen = torch.where(is_clean, to_clean, to_noisy)
        seen &= documents[:, at, None] == documents[:, None, :]
        hidden = ~seen[:, None]
        if hidden_tokens is None:
            return hidden
        hidden |= hidden_tokens.repeat_interleave(self.copies, dim=1)[:, None, None]
        return showing_itself(hidden, at)

    def attended_pairs(self, useful: torch.Tensor) -> torch.Tensor:
        """Number of pairs of positions of which the first attends to the second, int64 scalar.

        Args:
            useful: tokens that count, bool [G, L].
        """
        whole = counts(useful, self.documents)
        inside = counts(useful, self.blocks).square().sum()
        # Half of the pairs of tokens in different blocks of a document: the second block is later.
        earlier = (whole.square().sum() - inside) // 2
        clean = inside + earlier
        if self.causal_clean:
            clean = (whole * (whole + 1)).sum() // 2
        return self.views * (inside + earlier) + clean

    def labels(self, clean: torch.Tensor) -> torch.Tensor:
        """The token that the logits of each position predict, int64 [G, (K + 1) L].

        The clean copy predicts the next token, with `shift` or without.

        Args:
            clean: clean tokens, int64 [G, L].
        """
        following = clean.roll(-1, dims=1)
        noisy = following if self.shift else clean
        return self.interleave(noisy.repeat_interleave(self.views, dim=0), following)

    def predicting(self, mask: torch.Tensor, next_tokens: torch.Tensor | None) -> torch.Tensor:
        """Positions whose logits are needed, bool [G, (K + 1) L].

        Args:
            mask: masked tokens of each view, bool [B, L].
            next_tokens: tokens of the next-token loss, bool [G, L]; None: there is none.
        """
        masks = mask.view(-1, self.views, mask.shape[1])
        noisy = masks & ~self._reads_clean
        clean = (masks & self._reads_clean).any(dim=1)
        if next_tokens is not None:
            clean = clean | next_tokens
        if self.shift:
            noisy = noisy.roll(-1, dims=2)
        return self.interleave(noisy.view_as(mask), clean.roll(-1, dims=1))

    def to_tokens(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Moves values from the positions that predict tokens to the tokens.

        Args:
            values: one value per position, such as its cross entropy, [G, (K + 1) L], or a vector,
                such as its logits, [G, (K + 1) L, V].

        Returns:
            The value of the masked-diffusion prediction of each token of each view, [B, L], and of
            the next-token prediction of each token of each text, [G, L]; or vectors of them.
        """
        noisy, clean = self.separate(values)
        clean = clean.roll(1, dims=1)
        if self.shift:
            views = noisy.roll(1, dims=1).unflatten(0, (-1, self.views))
            reads_clean = self._reads_clean.view(
                *self._reads_clean.shape, *[1] * (values.dim() - 2)
            )
            noisy = torch.where(reads_clean, clean[:, None], views).view_as(noisy)
        return noisy, clean

    def shares_of_views(self, weight: torch.Tensor) -> torch.Tensor:
        """The share of each view in the gradient at the position that predicts a token, [B, L].

        The clean copy before a block predicts the block's first token for all views together. Their
        logits and labels are the same there, so the gradients of views differ by the weight alone.

        Args:
            weight: weight of each token in the loss, float [B, L]; 0 where it is not masked.
        """
        views = weight.unflatten(0, (-1, self.views))
        whole = views.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        return torch.where(self._reads_clean, views / whole, 1.0).view_as(weight)

    def next_tokens(self, eligible: torch.Tensor) -> torch.Tensor:
        """Tokens of the next-token loss: eligible ones with a token before them, bool [G, L].

        Args:
            eligible: tokens that count in the loss, bool [G, L].
        """
        return eligible & ~begins(self.documents)
