"""The rows of the embedding and the output layer: a mask token to be added, padding, tokenizers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mdm.errors import UserError

MASK_TOKEN = "<|mask|>"
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


def embedding_rows(config: dict[str, Any]) -> int:
    """Rows of the embedding that a config.json describes (LLaDA may have more than tokens)."""
    rows = config.get("embedding_size") or config.get("vocab_size")
    if not isinstance(rows, int):
        raise UserError("config.json has no 'vocab_size', which every family needs")
    return rows


def vocabulary(
    config: dict[str, Any], directory: Path, mask: int | None, add_mask: bool, multiple: int
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


def tokenizer_size(directory: Path) -> int | None:
    """One more than the largest id that the tokenizer's files name, None without a tokenizer."""
    ids: list[int] = []
    tokenizer = _json(directory / "tokenizer.json")
    if tokenizer:
        vocab = tokenizer.get("model", {}).get("vocab", {})
        ids += vocab.values() if isinstance(vocab, dict) else [len(vocab) - 1]
        ids += [token["id"] for token in tokenizer.get("added_tokens", [])]
    ids += (_json(directory / "vocab.json") or {}).values()
    ids += (_json(directory / "added_tokens.json") or {}).values()
    settings = _json(directory / "tokenizer_config.json") or {}
    ids += map(int, settings.get("added_tokens_decoder", {}))
    if not ids and (directory / "tokenizer.model").exists():
        from sentencepiece import SentencePieceProcessor

        ids = [SentencePieceProcessor(str(directory / "tokenizer.model")).vocab_size() - 1]
    return max(ids) + 1 if ids else None


def add_mask_token(directory: Path, mask: int) -> None:
    """Adds the mask token to the tokenizer files of a directory, which may have none.

    Raises:
        UserError: the tokenizer has no tokenizer.json, or knows the token.
    """
    path = directory / "tokenizer.json"
    if tokenizer_size(directory) is None:
        return
    tokenizer = _json(path)
    if tokenizer is None:
        raise UserError(
            "--add-mask-token needs the tokenizer's tokenizer.json: load it with transformers' "
            "AutoTokenizer and save it with save_pretrained first"
        )
    token = {
        "content": MASK_TOKEN,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    added = tokenizer.setdefault("added_tokens", [])
    if any(item["content"] == MASK_TOKEN for item in added):
        raise UserError(f"--add-mask-token: the tokenizer has {MASK_TOKEN} already")
    added.append({"id": mask, **token})
    _dump(path, tokenizer)
    settings = _json(directory / "tokenizer_config.json") or {}
    settings["mask_token"] = MASK_TOKEN
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"][str(mask)] = token
    _dump(directory / "tokenizer_config.json", settings)
    special = _json(directory / "special_tokens_map.json")
    if special is not None:
        _dump(directory / "special_tokens_map.json", special | {"mask_token": MASK_TOKEN})


def _json(path: Path) -> Any:
    """The contents of a JSON file, None if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
