"""Documents to measure a checkpoint on, as token ids: a JSONL or text file, or a .bin/.idx pair."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_mdm.config import MDMConfig
from megatron_mdm.data.documents import document_text, read_documents
from megatron_mdm.data.encoding import TokenizerData
from megatron_mdm.data.preprocess import load_hugging_face, load_sentencepiece
from megatron_mdm.errors import UserError
from megatron_mdm.evaluation import Text, cut_rows
from megatron_mdm.mcore.attention import isolated_documents
from megatron_mdm.mcore.data_files import check_data_files
from megatron_mdm.mcore.forward_step import eligible_positions
from megatron_mdm.mcore.inference import LoadedModel


@dataclass(frozen=True)
class Documents:
    """Tokenized documents, each with its end-of-document token.

    Attributes:
        ids: token ids of each document.
        num_bytes: their length in UTF-8; None where the tokenizer knows no text.
    """

    ids: list[list[int]]
    num_bytes: int | None


def read_tokens(loaded: LoadedModel, data: str, json_key: str, max_tokens: int) -> Documents:
    """Reads documents until there are `max_tokens` tokens, the last document whole.

    Args:
        loaded: the checkpoint, whose tokenizer is used.
        data: a text or JSONL file, plain or .gz, or the prefix of a .bin/.idx pair.
        json_key: where a JSONL line holds its text.
        max_tokens: see above.

    Raises:
        UserError: no such data, or data that cannot be read.
    """
    has_text = loaded.args.tokenizer_type != "NullTokenizer"
    ending = [] if loaded.end_token_id is None else [loaded.end_token_id]
    ids: list[list[int]] = []
    num_bytes = num_tokens = 0
    if os.path.isfile(data):
        encode = encoder(loaded)
        for document in read_documents([data]):
            text = document_text(document, json_key)
            if tokens := encode(text):
                ids.append([*tokens, *ending])
                num_bytes += len(text.encode())
                num_tokens += len(ids[-1])
            if num_tokens >= max_tokens:
                break
    else:
        check_data_files(([data], None), None)
        dataset = IndexedDataset(data)
        if len(dataset.document_indices) != len(dataset) + 1:
            raise UserError(
                f"{data} consists of prompts and responses, which have no likelihood as one text: "
                "give plain text"
            )
        for sequence in dataset:
            ids.append(sequence.tolist())
            num_tokens += len(sequence)
            if has_text:
                text = loaded.tokenizer.detokenize([i for i in ids[-1] if i not in ending])
                num_bytes += len(text.encode())
            if num_tokens >= max_tokens:
                break
    if not num_tokens:
        raise UserError(f"{data} holds no tokens: give other data")
    return Documents(ids, num_bytes if has_text else None)


def encoder(loaded: LoadedModel, special: bool = False) -> Callable[[str], list[int]]:
    """The checkpoint's tokenizer as preprocessing uses it: it puts nothing before a text.

    Args:
        loaded: the checkpoint.
        special: whether text that spells a special token is that token, as where preprocessing
            renders conversations with a chat template; else it is ordinary text.
    """
    data = _tokenizer_data(loaded.args.tokenizer_type, loaded.args.tokenizer_model)
    if data is not None:
        return data.load(special)
    if loaded.args.tokenizer_type == "HuggingFaceTokenizer":  # by the name of a repository
        tokenizer = loaded.tokenizer._tokenizer.tokenizer
        return lambda text: (
            tokenizer(text, add_special_tokens=False, split_special_tokens=not special).input_ids
        )
    return loaded.tokenizer.tokenize


def vocab_size(loaded: LoadedModel) -> int:
    """One more than the tokenizer's largest id, which has more of them than tokens if some lack."""
    data = _tokenizer_data(loaded.args.tokenizer_type, loaded.args.tokenizer_model)
    return loaded.tokenizer.vocab_size if data is None else data.vocab_size


@functools.cache
def _tokenizer_data(kind: str, model: str | None) -> TokenizerData | None:
    """What preprocessing reads of a tokenizer, None if it does not know the kind."""
    if kind == "SentencePieceTokenizer":
        return load_sentencepiece(model)
    if kind == "HuggingFaceTokenizer" and os.path.isdir(model):
        return load_hugging_face(model)
    return None


def rows_of(loaded: LoadedModel, documents: Documents, packed: bool, limit: int) -> list[Text]:
    """The first rows of documents, at most as long as the model's, with what it was trained on.

    Args:
        loaded: the checkpoint.
        documents: token ids.
        packed: see `cut_rows`.
        limit: most rows.
    """
    mdm = MDMConfig.from_args(loaded.args)
    texts = []
    for row in cut_rows(documents.ids, loaded.args.seq_length, packed)[:limit]:
        no_padding = torch.zeros_like(row[None], dtype=torch.bool)
        eod_id = loaded.tokenizer.eod
        documents = isolated_documents(row[None], eod_id, mdm)
        eligible = eligible_positions(row[None], no_padding, eod_id, mdm, documents)
        texts.append(Text(row, eligible[0]))
    return texts
