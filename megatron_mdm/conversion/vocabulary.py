"""The rows of the embedding and the output layer: a mask token to be added, padding."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_mdm.conversion.config import Config
from megatron_mdm.conversion.tokenizer import tokenizer_size
from megatron_mdm.errors import UserError

# The Megatron tensors with a row for each token.
TENSORS = ("embedding.word_embeddings.weight", "output_layer.weight")
_ROWS = 8192


@dataclass(frozen=True)
class Vocabulary:
    """The rows of a model, on both sides.

    Attributes:
        source: rows of the Hugging Face model that is read.
        size: rows that mean something: `source`, or more with an added mask token.
        padded: rows of Megatron's model; those from `size` on are zeros.
        mask: id of the mask token, None if the model has none.
        added: the mask token is new, and its row is the mean of those before it.
    """

    source: int
    size: int
    padded: int
    mask: int | None
    added: bool = False

    def widen(self, tensor: torch.Tensor) -> torch.Tensor:
        """Megatron's rows [padded, h] from the source's [source, h]."""
        if self.padded == self.source and not self.added:
            return tensor
        wide = tensor.new_zeros(self.padded, tensor.shape[1])
        wide[: self.source] = tensor
        if self.added:
            assert self.mask is not None
            known = tensor[: self.mask]
            total = torch.zeros(tensor.shape[1], dtype=torch.float64)
            for rows in known.split(_ROWS):  # a double copy of a few rows at a time
                total += rows.double().sum(dim=0)
            wide[self.mask] = total / len(known)
        return wide


def embedding_rows(config: Config) -> int:
    """Rows of the embedding that a config.json describes (LLaDA may have more than tokens)."""
    rows = config.get("embedding_size") or config.get("vocab_size")
    if rows is None:
        raise UserError("config.json has no 'vocab_size', which every family needs")
    return int(rows)


def vocabulary(
    config: Config, directory: Path, mask: int | None, add_mask: bool, multiple: int
) -> Vocabulary:
    """Decides on the rows.

    Args:
        config: config.json.
        directory: the Hugging Face model's, for its tokenizer.
        mask: the mask token that the model has.
        add_mask: add one.
        multiple: of which Megatron's number of rows is to be.

    Raises:
        UserError: the vocabulary is smaller than the tokenizer's, or there is a mask token already.
    """
    rows = size = embedding_rows(config)
    tokens = tokenizer_size(directory)
    if tokens is not None and tokens > rows:
        raise UserError(
            f"the tokenizer in {directory} has {tokens} tokens, the model's vocabulary {rows}: use "
            "the tokenizer that belongs to the model"
        )
    if add_mask:
        if mask is not None:
            raise UserError(f"--add-mask-token: the model has mask token {mask} already")
        mask = rows if tokens is None else tokens
        size = max(rows, mask + 1)
    if mask is not None and not 0 <= mask < size:
        raise UserError(f"the mask token {mask} lies outside the model's vocabulary of {size}")
    return Vocabulary(rows, size, -(-size // multiple) * multiple, mask, add_mask)
