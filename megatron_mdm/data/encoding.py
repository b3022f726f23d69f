"""Text to token ids, in worker processes.

Imports neither torch nor megatron nor transformers, so that a worker starts in a moment.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_mdm.data.documents import BadDocumentError, Document, document_text


@dataclasses.dataclass(frozen=True)
class TokenizerData:
    """A tokenizer in a form that travels to worker processes.

    Exactly one of `sentencepiece_model` (the bytes of a `.model` file) and `tokenizer_json` (the
    JSON of a `tokenizers.Tokenizer`) is set. `vocab_size` is larger than every id; `eod` is the
    id of the end-of-document token, if there is one.
    """

    vocab_size: int
    eod: int | None
    sentencepiece_model: bytes | None = None
    tokenizer_json: str | None = None

    def load(self, special: bool = False) -> Callable[[str], list[int]]:
        """Returns a function from a text to its ids; the tokenizer adds no special tokens.

        Text that spells a special token, such as "<mask>", is encoded like any other text, unless
        `special` (which sentencepiece cannot do).
        """
        if self.sentencepiece_model is not None:
            import sentencepiece

            return sentencepiece.SentencePieceProcessor(model_proto=self.sentencepiece_model).encode
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_str(self.tokenizer_json)
        tokenizer.encode_special_tokens = not special
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def open_hugging_face(directory: str, trust: bool = False) -> Any:
    """The Hugging Face tokenizer in a local directory.

    Args:
        directory: with its files.
        trust: run Python code that is there; else nobody is asked about it either.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust)


def named_code(settings: Mapping[str, Any], *kinds: str) -> list[str]:
    """The Python classes, `module.Class`, that a file of a model has in place of transformers' own.

    Args:
        settings: contents of a tokenizer_config.json or config.json.
        kinds: classes of transformers that they take the place of; by default AutoTokenizer.
    """
    names = settings.get("auto_map") or {}
    if not isinstance(names, dict):
        names = {"AutoTokenizer": names}
    found: list[str] = []
    for kind in kinds or ("AutoTokenizer",):
        given = names.get(kind) or ()
        found += [given] if isinstance(given, str) else [str(name) for name in given if name]
    return found


class EncodedChunk(NamedTuple):
    """The tokens of successive documents.

    Attributes:
        tokens: One array with all documents, each with its end-of-document token.
        lengths: Tokens of each sequence of each document.
        text_bytes: Length of the documents as UTF-8.
        empty: How many documents without any token were left out.
        bad: `FILE:LINE: REASON` of the documents that could not be read.
        position: Where the input had been read to, as `Document.position`.
    """

    tokens: np.ndarray
    lengths: list[list[int]]
    text_bytes: int
    empty: int
    bad: list[str]
    position: int


class ChunkEncoder:
    """Maps lists of documents to `EncodedChunk`.

    Args:
        tokenizer: What to encode with.
        json_key: Where a JSONL line holds its text.
        append_eod: Whether to end each document with `tokenizer.eod`.
    """

    def __init__(self, tokenizer: TokenizerData, json_key: str, append_eod: bool) -> None:
        self._encode = tokenizer.load()
        self._json_key = json_key
        self._ending = [tokenizer.eod] if append_eod else []
        # Small, because it travels to the parent, which converts it to Megatron's choice.
        self._dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32

    def __call__(self, documents: Sequence[Document]) -> EncodedChunk:
        """Encodes one chunk, which must not be empty."""
        arrays, lengths, bad = [], [], []
        text_bytes = empty = 0
        for document in documents:
            try:
                texts = self._texts(document)
            except BadDocumentError as error:
                bad.append(str(error))
                continue
            sequences = [self._encode(text) for text in texts]
            if not sequences[-1]:
                empty += 1
                continue
            text_bytes += sum(len(text.encode()) for text in texts)
            if sequences[-1][-1:] != self._ending:
                sequences[-1] = sequences[-1] + self._ending
            arrays += [np.array(ids, dtype=self._dtype) for ids in sequences]
            lengths.append([len(ids) for ids in sequences])
        tokens = np.concatenate(arrays) if arrays else np.empty(0, self._dtype)
        return EncodedChunk(tokens, lengths, text_bytes, empty, bad, documents[-1].position)

    def _texts(self, document: Document) -> Sequence[str]:
        """The sequences of a document; without the last one there is nothing to learn from it."""
        return [document_text(document, self._json_key)]
