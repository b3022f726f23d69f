"""The rows of the embedding and the output layer, with an added mask token and padding."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_mdm.conversion.config import Config
from megatron_mdm.conversion.tokenizer import known_mask, tokenizer_size
from megatron_mdm.errors import UserError

# The Megatron tensors that have a row for each token.
TENSORS = ("embedding.word_embeddings.weight", "output_layer.weight")
_ROWS = 8192


@dataclass(frozen=True)
class Vocabulary:
    """The numbers of vocabulary rows in the Hugging Face model and in Megatron's.

    Attributes:
        source: rows of the Hugging Face model.
        size: rows without padding: `source`, or more if a mask token is added.
        padded: rows of Megatron's model; rows from `size` on are zeros.
        mask: id of the mask token, None if the model has none.
        added: whether the mask token is new; its row is the mean of the rows before it.
    """

    source: int
    size: int
    padded: int
    mask: int | None
    added: bool = False

    def widen(self, tensor: torch.Tensor) -> torch.Tensor:
        """Makes Megatron's rows [padded, h] from the Hugging Face rows [source, h]."""
        if self.padded == self.source and not self.added:
            return tensor
        wide = tensor.new_zeros(self.padded, tensor.shape[1])
        wide[: self.source] = tensor
        if self.added:
            assert self.mask is not None
            known = tensor[: self.mask]
            total = torch.zeros(tensor.shape[1], dtype=torch.float64)
            for rows in known.split(_ROWS):  # float64 copies of a few rows at a time
                total += rows.double().sum(dim=0)
            wide[self.mask] = total / len(known)
        return wide


def embedding_rows(config: Config) -> int:
    """Returns the number of embedding rows in config.json (LLaDA may have more than tokens)."""
    rows = config.get("embedding_size") or config.get("vocab_size")
    if rows is None:
        raise UserError("config.json has no 'vocab_size', which every family needs")
    return int(rows)


def vocabulary(
    config: Config, directory: Path, mask: int | None, add_mask: bool, multiple: int
) -> Vocabulary:
    """Determines the numbers of rows.

    Args:
        config: content of config.json.
        directory: directory of the Hugging Face model, for its tokenizer.
        mask: id of the model's mask token, None if it has none.
        add_mask: add a mask token.
        multiple: Megatron's number of rows is padded to a multiple of this number.

    Raises:
        UserError: the model has fewer rows than the tokenizer has tokens, a mask token is to be
            added to a model or a tokenizer that has one, or the mask token has no row.
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
        known = known_mask(directory)
        if known is not None:
            raise UserError(f"--add-mask-token: {known}")
        mask = rows if tokens is None else tokens
        size = max(rows, mask + 1)
    if mask is not None and not 0 <= mask < size:
        raise UserError(f"the mask token {mask} lies outside the model's vocabulary of {size}")
    return Vocabulary(rows, size, -(-size // multiple) * multiple, mask, add_mask)
