"""Logits of the blocks of a text, one block after another, with a cache of the finished ones.

The keys and values of finished blocks never change, because no block sees a later one. They come
from one more pass over the CLEAN tokens of each finished block, since training shows clean tokens
to later blocks. Megatron's own cache for inference serves causal models: it applies no mask after
the prompt, and a prefill of several blocks needs one.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.attention import Attention
from megatron.core.utils import get_model_config

from megatron_mdm.mcore.inference.loaded_model import LoadedModel
from megatron_mdm.mcore.model.attention_mask import block_attention_mask, hidden_tokens
from megatron_mdm.mcore.model.inputs import ModelInputs
from megatron_mdm.objective.blocks import hidden_in_decoding, showing_itself


class KeyValueCache:
    """Keys and values of the first positions of rows, in every attention layer of a stage.

    Args:
        model: the stage.
        capacity: largest number of positions.

    Attributes:
        length: number of positions that are kept.
    """

    def __init__(self, model: torch.nn.Module, capacity: int) -> None:
        self._layers: list[Any] = [
            module.core_attention for module in model.modules() if isinstance(module, Attention)
        ]
        self._capacity = capacity
        self._kept: dict[int, list[torch.Tensor]] = {}
        self.length = 0

    @contextmanager
    def attended(self, count: int, keep: bool) -> Iterator[None]:
        """Context of one pass, in which positions also attend to all kept ones, which precede them.

        Args:
            count: number of positions of the pass.
            keep: whether to keep their keys and values.
        """
        handles = [
            layer.register_forward_pre_hook(partial(self._extend, number))
            for number, layer in enumerate(self._layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if keep:
            self.length += count

    def _extend(self, number: int, _: Any, words: tuple) -> tuple:
        """Puts the kept keys and values, [n, b, heads, channels], before those of the pass."""
        query, *own = words[:3]
        if number not in self._kept:
            self._kept[number] = [x.new_empty(self._capacity, *x.shape[1:]) for x in own]
        end = self.length + len(own[0])
        for kept, x in zip(self._kept[number], own, strict=True):
            kept[self.length : end] = x
        return query, *(kept[:end] for kept in self._kept[number]), *words[3:]


class BlockLogits:
    """The `LogitsFunction` of a model with blocks (generation/decoder.py), for one batch of rows.

    Args:
        loaded: the model.
        length: tokens in a row.
        cached: whether to keep keys and values of finished blocks. Otherwise every call computes
            all of them again, with the same logits.
    """

    def __init__(self, loaded: LoadedModel, length: int, cached: bool = True) -> None:
        assert loaded.block_size is not None
        self._loaded = loaded
        self._size = loaded.block_size
        self._cache = KeyValueCache(loaded.model, length) if cached else None
        self._before: torch.Tensor | None = None  # logits at the last finished position

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the last block.

        Args:
            tokens: the tokens up to the end of the block, int64 [b, e], the same on all ranks. With
                a cache, the blocks before the last must be those of the call before.

        Returns:
            float [b, n, V], unshifted, the same on all ranks; n tokens are in the block.

        Raises:
            UserError: the first token is masked, and the model is shifted.
        """
        shift, end = self._loaded.mdm.shift, tokens.shape[1]
        start = (end - 1) // self._size * self._size
        if shift:
            self._loaded.check_first_tokens(tokens, torch.arange(end, device=tokens.device))
        if self._cache is not None and self._cache.length < start:
            self._before = self._pass(tokens[:, :start], start, last=1)
        # Without a cache the same pass has the logits that predict the first token.
        more = int(shift and self._cache is None and start > 0)
        logits = self._pass(tokens, start, last=end - start + more)
        if not shift:
            return logits
        if more:
            return logits[:, :-1]
        # Nothing predicts the first token of a text, so it keeps its own logits.
        before = logits[:, :1] if self._before is None else self._before
        return torch.cat([before, logits[:, :-1]], dim=1)

    def _pass(self, tokens: torch.Tensor, finished: int, last: int) -> torch.Tensor:
        """Runs the model on the positions that are not in the cache.

        Args:
            tokens: int64 [b, e].
            finished: number of positions in finished blocks.
            last: number of positions at the end that have logits.

        Returns:
            float [b, last, V], at their positions.
        """
        loaded, end = self._loaded, tokens.shape[1]
        start = 0 if self._cache is None else self._cache.length
        own = tokens[:, start:]
        hidden = hidden_in_decoding(start, end, finished, self._size, loaded.causal_clean)
        mask, positions = None, torch.arange(start, end, device=tokens.device)
        if hidden.any() or not loaded.mdm.eod_attended:
            ends = hidden_tokens(tokens, None, loaded.tokenizer.eod, loaded.mdm)
            hidden = hidden.to(tokens.device)[None, None] | ends[:, None, None]
            hidden = showing_itself(hidden, positions)
            mask = block_attention_mask(hidden, get_model_config(loaded.model))
        inputs = ModelInputs(own, positions.expand_as(own), mask, loaded.mdm.shift, start=start)
        with ExitStack() as stack:
            if self._cache is not None:
                stack.enter_context(self._cache.attended(end - start, keep=finished == end))
            return loaded.run(inputs, own, end - start, last)
