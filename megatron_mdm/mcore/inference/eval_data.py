"""Reads texts for evaluations as token ids, from a JSONL or text file or a .bin/.idx pair."""

import datetime
import functools
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_mdm.data.chat import TEMPLATE_DATE
from megatron_mdm.data.documents import Document, document_text, read_documents
from megatron_mdm.data.encoding import TokenizerData
from megatron_mdm.data.identity import data_identity
from megatron_mdm.data.load_tokenizer import has_chat_template, load_hugging_face
from megatron_mdm.data.pairs import PairEncoder, PairKeys
from megatron_mdm.data.sampling import Reservoir, drawn
from megatron_mdm.errors import UserError
from megatron_mdm.evaluation.nelbo import ScoredRow, cut_rows
from megatron_mdm.generation.decoder import Decoder, LogitsFunction
from megatron_mdm.mcore.data.batch import Batch
from megatron_mdm.mcore.data.documents import eligible_positions, isolated_documents
from megatron_mdm.mcore.data.row_dataset import rows_of_file
from megatron_mdm.mcore.flags.data_files import check_data_files, has_several_sequences
from megatron_mdm.mcore.flags.identities import other_tokenizer_of_data
from megatron_mdm.mcore.inference.block_logits import BlockLogits
from megatron_mdm.mcore.inference.loaded_model import LoadedModel
from megatron_mdm.mcore.tokenizer import chat_template, tokenizer_data, tokenizer_rows

# Rows read for each row measured, so that the measured rows come from many documents even if
# documents are long.
POOL = 8


@dataclass(frozen=True)
class Documents:
    """Tokenized documents, each with its end-of-document token.

    Attributes:
        ids: token ids of each document, an integer array of one dimension.
        num_bytes: length of all documents in UTF-8; None if the tokenizer knows no text.
    """

    ids: list[np.ndarray]
    num_bytes: int | None


def read_tokens(
    loaded: LoadedModel,
    data: str,
    json_key: str,
    enough: int,
    seed: int,
    file_format: str = "auto",
) -> Documents:
    """Draws whole documents at random from the whole data until they have `enough` tokens.

    Args:
        loaded: the checkpoint, whose tokenizer is used.
        data: a text or JSONL file, plain or .gz, or the prefix of a .bin/.idx pair.
        json_key: key of the text in a JSONL line.
        enough: number of tokens.
        seed: seed of the sample.
        file_format: format of a file; see `read_documents`.

    Returns:
        The documents, in the order of the data.

    Raises:
        UserError: the data do not exist or cannot be read.
    """
    if os.path.isfile(data):
        found = _documents_of_file(loaded, data, json_key, enough, seed, file_format)
    else:
        found = _indexed_documents(loaded, data, enough, seed)
    if not found:
        raise UserError(f"{data} holds no tokens: give other data")
    sizes = [num_bytes for _, num_bytes in found if num_bytes is not None]
    return Documents([ids for ids, _ in found], sum(sizes) if len(sizes) == len(found) else None)


def _documents_of_file(
    loaded: LoadedModel, data: str, json_key: str, enough: int, seed: int, file_format: str
) -> list[tuple[np.ndarray, int | None]]:
    """Token ids of documents of a text or JSONL file, and the number of bytes of each."""
    has_text = loaded.args.tokenizer_type != "NullTokenizer"
    ending = [] if loaded.end_token_id is None else [loaded.end_token_id]
    encode = encoder(loaded)

    def encoded(document: Document) -> tuple[int, tuple[np.ndarray, int | None]] | None:
        text = document_text(document, json_key)
        tokens = encode(text)
        if not tokens:
            return None
        _check_ids(loaded, data, np.array(tokens))
        ids = np.array([*tokens, *ending], dtype=np.int32)
        return len(ids), (ids, len(text.encode()) if has_text else None)

    sample: Reservoir[tuple[np.ndarray, int | None]] = Reservoir(enough, seed)
    for document in read_documents([data], file_format):
        sample.offer(functools.partial(encoded, document))
    return sample.items()


def _indexed_documents(
    loaded: LoadedModel, data: str, enough: int, seed: int
) -> list[tuple[np.ndarray, int | None]]:
    """Token ids of documents of a .bin/.idx pair, and the number of bytes of each."""
    if is_pair_dataset(data):
        raise UserError(
            f"{data} consists of prompts and responses, which have no likelihood as one text: "
            "give plain text"
        )
    _check_made_with(loaded, data)
    dataset = IndexedDataset(data)
    found: list[tuple[np.ndarray, int | None]] = []
    for number in drawn(dataset.sequence_lengths, enough, seed):
        ids = dataset[number].astype(np.int32)
        _check_ids(loaded, data, ids)
        num_bytes = None
        if loaded.args.tokenizer_type != "NullTokenizer":
            words = ids[ids != loaded.end_token_id].tolist()
            num_bytes = len(loaded.tokenizer.detokenize(words).encode())
        found.append((ids, num_bytes))
    return found


def encoder(loaded: LoadedModel, special: bool = False) -> Callable[[str], list[int]]:
    """The checkpoint's tokenizer as preprocessing uses it, which adds no token before a text.

    Args:
        loaded: the checkpoint.
        special: whether text that spells a special token becomes that token, as when preprocessing
            renders conversations with a chat template. If not, it is ordinary text.
    """
    data = tokenizer_data(loaded.tokenizer)
    return data.load(special) if isinstance(data, TokenizerData) else loaded.tokenizer.tokenize


def chat_encoder(loaded: LoadedModel, key: str, ignored: Sequence[str]) -> PairEncoder:
    """An encoder of conversations that works like preprocessing for training.

    A template that asks for today's date gets that of `template_date`.

    Args:
        loaded: the checkpoint.
        key: key of the messages in a JSON object.
        ignored: keys to ignore.

    Raises:
        UserError: the checkpoint's tokenizer has no chat template.
    """
    directory = loaded.args.tokenizer_model
    is_chat = loaded.args.tokenizer_type == "HuggingFaceTokenizer" and has_chat_template(directory)
    if not is_chat:
        raise UserError("--messages needs a checkpoint whose tokenizer has a chat template")
    date = template_date(loaded.args)
    keys = PairKeys(messages=key, template=directory, ignored=tuple(ignored), date=date)
    return PairEncoder(load_hugging_face(directory), keys, append_eod=False)


def template_date(args: Namespace) -> datetime.date:
    """The date that a chat template wrote for today's date in the data of a checkpoint.

    Args:
        args: arguments of the checkpoint, which record how its data were encoded.

    Returns:
        The date; `TEMPLATE_DATE` if none is known, or if there are several.
    """
    dates = {data.get("template_date") for data in getattr(args, "mdm_data", None) or ()} - {None}
    return datetime.date.fromisoformat(dates.pop()) if len(dates) == 1 else TEMPLATE_DATE


def spells_special_tokens(args: Namespace, asked: bool | None = None) -> bool:
    """Whether text that spells a special token became that token in the data of a checkpoint.

    Args:
        args: arguments of the checkpoint, which record how its data were encoded.
        asked: the user's answer (--special-tokens), if there is one.

    Returns:
        The answer. It is also True if it is unknown for some data, or if data differ, because
        rendered conversations spell out their special tokens.
    """
    if asked is not None:
        return asked
    known = {data.get("special_tokens") for data in getattr(args, "mdm_data", None) or ()}
    return known != {False}


def vocab_size(loaded: LoadedModel) -> int:
    """One more than the tokenizer's largest id. Some smaller ids may name no token."""
    return tokenizer_rows(loaded.tokenizer)


def decoder_of(
    loaded: LoadedModel, eos_token_ids: int | Sequence[int] | None = None, **settings: Any
) -> Decoder:
    """The decoder for a checkpoint's texts.

    Args:
        loaded: the checkpoint.
        eos_token_ids: tokens that end a text; default: the end-of-document token, and the token
            that the chat template writes after an answer, as far as there are such tokens.
        settings: other arguments of `Decoder`.

    Raises:
        UserError: a value is out of range, or the model has no mask token.
    """
    if eos_token_ids is None:
        chat = chat_template(loaded.tokenizer)
        found = (loaded.end_token_id, chat.answer_end_id() if chat else None)
        ends = tuple(dict.fromkeys(end for end in found if end is not None))
    else:
        ends = (eos_token_ids,) if isinstance(eos_token_ids, int) else tuple(eos_token_ids)
    return Decoder(
        loaded.mask_token_id,
        end_token_ids=ends,
        vocab_size=vocab_size(loaded),
        block_size=loaded.block_size,
        **settings,
    )


def decoding_logits(loaded: LoadedModel, length: int, cached: bool = True) -> LogitsFunction:
    """The function that the decoder of a checkpoint calls, for one batch of rows.

    Args:
        loaded: the checkpoint.
        length: tokens in a row.
        cached: for models with blocks, see `BlockLogits`.
    """
    return loaded.logits if loaded.block_size is None else BlockLogits(loaded, length, cached)


def rows_from_documents(loaded: LoadedModel, documents: Documents, packed: bool) -> list[ScoredRow]:
    """Cuts documents into rows of at most the length of training rows, as in training.

    A shifted model does not predict the first token of a row. Its rows therefore begin with the
    last token of the previous row, or with the end-of-document token, so that every token is scored
    in one row.

    Args:
        loaded: the checkpoint.
        documents: token ids.
        packed: see `cut_rows`.
    """
    mdm, eod_id = loaded.mdm, loaded.tokenizer.eod
    ids = documents.ids
    if mdm.shift and loaded.opening_token_id is not None:
        opened = [np.insert(document, 0, loaded.opening_token_id) for document in ids]
        ids = [*opened[:1], *ids[1:]] if packed else opened
    numbers = [np.full(len(document), number) for number, document in enumerate(ids)]
    rows, origins = (
        cut_rows(values, loaded.args.seq_length, packed, overlap=int(mdm.shift))
        for values in (ids, numbers)
    )
    texts = []
    for row, origin in zip(rows, origins, strict=True):
        no_padding = torch.zeros_like(row[None], dtype=torch.bool)
        apart = isolated_documents(row[None], eod_id, mdm)
        eligible = eligible_positions(row[None], no_padding, eod_id, mdm, apart)
        # The hidden end-of-document tokens follow from the unmasked row, and so do clean copies.
        if apart is None and (not mdm.eod_attended or mdm.blocks is not None):
            apart = torch.zeros_like(row[None])
        texts.append(ScoredRow(row, eligible[0], None if apart is None else apart[0], origin))
    return texts


def shuffled(rows: list[ScoredRow], seed: int) -> list[ScoredRow]:
    """The rows in a random order."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[i] for i in order.tolist()]


def scored_per_byte(
    loaded: LoadedModel, rows: list[ScoredRow], documents: Documents
) -> float | None:
    """The number of scored tokens per byte of text.

    None if the number of bytes is unknown, or if tokens that have bytes are not scored: a shifted
    model without an opening token does not score the first token of a document.

    Args:
        loaded: the checkpoint.
        rows: all rows of the documents.
        documents: the documents.
    """
    if not documents.num_bytes or (loaded.mdm.shift and loaded.opening_token_id is None):
        return None
    return sum(int(row.eligible.sum()) for row in rows) / documents.num_bytes


def sampled_rows(
    loaded: LoadedModel,
    data: str,
    json_key: str,
    number: int,
    seed: int,
    file_format: str = "auto",
    packed: bool = True,
) -> tuple[list[ScoredRow], float | None]:
    """Draws rows from all over the data, in a random order.

    Args:
        loaded: the checkpoint, whose tokenizer is used.
        data: a text or JSONL file, plain or .gz, or the prefix of a .bin/.idx pair.
        json_key: key of the text in a JSONL line.
        number: number of rows; the data may have fewer.
        seed: seed of the documents and of the order.
        file_format: format of a file; see `read_documents`.
        packed: see `cut_rows`.

    Returns:
        The rows, and the number of scored tokens per byte of all documents that were read, of which
        the rows hold parts; see `scored_per_byte`.

    Raises:
        UserError: see `read_tokens`.
    """
    enough = POOL * number * loaded.args.seq_length
    documents = read_tokens(loaded, data, json_key, enough, seed, file_format)
    every = rows_from_documents(loaded, documents, packed)
    return shuffled(every, seed)[:number], scored_per_byte(loaded, every, documents)


def is_pair_dataset(prefix: str) -> bool:
    """Whether an indexed dataset consists of prompts and responses instead of running text.

    Raises:
        UserError: there is no such dataset, or it is damaged.
    """
    check_data_files(([prefix], None), None)
    return has_several_sequences(prefix)


def _check_made_with(loaded: LoadedModel, prefix: str) -> None:
    """Raises a `UserError` for a .bin/.idx pair that was made with another tokenizer."""
    made_with = data_identity(prefix).tokenizer
    line = other_tokenizer_of_data(prefix, made_with, tokenizer_data(loaded.tokenizer))
    if line:
        raise UserError(line)


def rows_from_pairs(loaded: LoadedModel, prefix: str, limit: int) -> list[ScoredRow]:
    """Rows of prompts and responses, as fine-tuning would take them from this file.

    Fine-tuning takes rows in a random order, so the rows come from the whole file. The settings of
    the objective, including padding and SyRM, are those of the checkpoint's run.

    Args:
        loaded: the checkpoint.
        prefix: prefix of a .bin/.idx pair for which `is_pair_dataset` is true.
        limit: largest number of rows.

    Raises:
        UserError: the checkpoint's settings do not allow pairs, or the model lacks a token id of
            the data, or the data were made with another tokenizer.
    """
    mdm, eod_id = replace(loaded.mdm, sft=True), loaded.tokenizer.eod
    if not (mdm.eod_attended and mdm.pad_attended):
        raise UserError(
            f"{prefix} holds pairs, on which a checkpoint of --no-mdm-eod-attended or "
            "--no-mdm-pad-attended cannot be measured"
        )
    _check_made_with(loaded, prefix)
    dataset = rows_of_file(loaded.args, mdm, prefix)
    texts = []
    for number in range(min(limit, len(dataset))):
        item = dataset[number]
        _check_ids(loaded, prefix, item["tokens"].numpy())
        batch = Batch.of_rows([item], mdm, eod_id)
        apart = batch.attention_segments
        documents = None if apart is None else apart[0]
        texts.append(ScoredRow(batch.tokens[0], batch.eligible[0], documents))
    return texts


def _check_ids(loaded: LoadedModel, data: str, ids: np.ndarray) -> None:
    """Raises a `UserError` if the data contain token ids that the model does not have."""
    size = loaded.args.mdm_vocab_size
    if len(ids) and not 0 <= ids.min() <= ids.max() < size:
        wrong = ids.max() if ids.max() >= size else ids.min()
        raise UserError(
            f"{data} contains the token id {wrong} and the model has only {size} token ids: "
            "tokenize the data with the model's tokenizer"
        )
