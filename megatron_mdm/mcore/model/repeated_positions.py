"""Rotary embeddings of rows that hold every token several times, or that begin inside a text."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.utils import unwrap_model


@contextmanager
def repeated_positions(model: Any, copies: int = 1, start: int = 0) -> Iterator[None]:
    """Context in which all copies of a token have the rotary embedding of the token's position.

    Megatron makes the table for the length of its input. In this context it makes the table of the
    tokens from `start` on, a `copies`-th of that length, and each entry is repeated. Megatron
    caches tables by their length, so a row of ordinary positions gets its own. Context parallelism
    cuts the table of the tokens just as it cuts the repeated one, because a part holds all copies
    of its tokens.

    Args:
        model: a stage of the model.
        copies: positions of each token.
        start: position of the first token; above 0 without context parallelism only.
    """
    table = getattr(unwrap_model(model), "rotary_pos_emb", None)
    if not isinstance(table, torch.nn.Module):  # learned positions come from the position ids
        yield
        return

    def of_tokens(_: Any, words: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return (words[0] // copies + start, *words[1:]), named

    def repeat(_: Any, __: tuple, found: Any) -> Any:
        if isinstance(found, tuple):  # Yarn returns a scale too
            return repeat(_, __, found[0]), *found[1:]
        return None if found is None else found[start:].repeat_interleave(copies, dim=0)

    handles = [
        table.register_forward_pre_hook(of_tokens, with_kwargs=True),
        table.register_forward_hook(repeat),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
