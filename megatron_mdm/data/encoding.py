"""Encodes text as token ids, in worker processes.

Imports neither torch nor megatron nor transformers, so that workers start quickly.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_mdm.data.documents import (
    BadDocumentError,
    Document,
    bad_document,
    document_text,
)
from megatron_mdm.data.special_tokens import SpecialTokens

# Mask tokens by their text: this project's, BERT's and MDLM's, LLaDA's, Dream's.
MASK_PIECES = ("<mask>", "[MASK]", "<|mdm_mask|>", "<|mask|>")


@dataclasses.dataclass(frozen=True)
class TokenizerData:
    """A tokenizer in a form that can be sent to worker processes.

    Exactly one of `sentencepiece_model` (the bytes of a `.model` file) and `tokenizer_json` (the
    JSON of a `tokenizers.Tokenizer`) is set. `vocab_size` is larger than every id; `eod` is the
    id of the end-of-document token, and `mask` that of the mask token, if there is one. `special`
    are the ids of special tokens, without the token for unknown text.
    """

    vocab_size: int
    eod: int | None
    mask: int | None = None
    sentencepiece_model: bytes | None = None
    tokenizer_json: str | None = None
    special: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """Megatron's name for the type of the tokenizer."""
        is_pieces = self.sentencepiece_model is not None
        return "SentencePieceTokenizer" if is_pieces else "HuggingFaceTokenizer"

    def digest(self) -> str:
        """Returns a digest of the tokenizer; equal digests mean equal ids for every text."""
        model = self.sentencepiece_model
        if model is None:
            assert self.tokenizer_json is not None
            model = self.tokenizer_json.encode()
        content = hashlib.sha256(model)
        content.update(f"{self.vocab_size} {self.eod} {self.mask}".encode())
        return content.hexdigest()

    def load(self, special: bool = False) -> Callable[[str], list[int]]:
        """Returns a function that maps a text to its ids and adds no special tokens.

        By default text that spells a special token, such as "<mask>", is encoded like any other
        text. With `special` it becomes that token, which sentencepiece cannot do.
        """
        if self.sentencepiece_model is not None:
            import sentencepiece

            processor = sentencepiece.SentencePieceProcessor(model_proto=self.sentencepiece_model)
            encode: Callable[[str], list[int]] = processor.encode
            return encode
        tokenizer = self._fast()
        tokenizer.encode_special_tokens = not special
        return lambda text: tokenizer.encode(text, add_special_tokens=False).ids

    def special_tokens(self) -> SpecialTokens:
        """Returns the special tokens of a Hugging Face tokenizer."""
        return SpecialTokens(self._fast(), self.special)

    def _fast(self) -> Any:
        import tokenizers

        assert self.tokenizer_json is not None
        tokenizer = tokenizers.Tokenizer.from_str(self.tokenizer_json)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def open_hugging_face(directory: str, trust: bool = False) -> Any:
    """Opens the Hugging Face tokenizer in a local directory.

    Args:
        directory: directory with the tokenizer's files.
        trust: run Python code in the directory. If False, the code is not run, and the user is not
            asked about it either.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust)


def named_code(settings: Mapping[str, Any], *kinds: str) -> list[str]:
    """Returns the Python classes, `module.Class`, that replace transformers' own classes.

    Args:
        settings: content of a tokenizer_config.json or config.json.
        kinds: classes of transformers that are replaced; by default AutoTokenizer.
    """
    names = settings.get("auto_map") or {}
    if not isinstance(names, dict):
        names = {"AutoTokenizer": names}
    found: list[str] = []
    for kind in kinds or ("AutoTokenizer",):
        given = names.get(kind) or ()
        found += [given] if isinstance(given, str) else [str(name) for name in given if name]
    return found


def mask_id(tokenizer: Any) -> int | None:
    """Returns the id of a tokenizer's mask token, None if it has none.

    Args:
        tokenizer: a sentencepiece processor, or a Hugging Face tokenizer.
    """
    known: int | None = getattr(tokenizer, "mask_token_id", None)
    if known is not None:  # Hugging Face
        return known
    if hasattr(tokenizer, "piece_to_id"):  # sentencepiece, where an unknown piece maps to unk
        candidates = {piece: tokenizer.piece_to_id(piece) for piece in MASK_PIECES}
        return next((i for i in candidates.values() if i != tokenizer.unk_id()), None)
    if hasattr(tokenizer, "get_vocab"):  # Hugging Face without a mask token set
        vocab = tokenizer.get_vocab()
        return next((vocab[piece] for piece in MASK_PIECES if piece in vocab), None)
    return None


def sentencepiece_data(processor: Any) -> TokenizerData:
    """Makes the data of a sentencepiece processor."""
    eod = processor.eos_id()
    return TokenizerData(
        vocab_size=processor.get_piece_size(),
        eod=eod if eod >= 0 else None,
        mask=mask_id(processor),
        sentencepiece_model=processor.serialized_model_proto(),
    )


def hugging_face_data(tokenizer: Any) -> TokenizerData:
    """Makes the data of a fast Hugging Face tokenizer.

    The end-of-document token is the tokenizer's eos token, or its sep token if it has no eos token,
    as in Megatron's own class for these tokenizers.
    """
    eos = tokenizer.eos_token_id
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    special = {number for number, token in added.items() if token.special}
    return TokenizerData(
        vocab_size=max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0)),
        eod=tokenizer.sep_token_id if eos is None else eos,
        mask=mask_id(tokenizer),
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        special=tuple(sorted(special - {tokenizer.unk_token_id})),
    )


class EncodedChunk(NamedTuple):
    """The tokens of consecutive documents.

    Attributes:
        tokens: One array with all documents, each with its end-of-document token.
        lengths: Number of tokens of each sequence of each document.
        text_bytes: Length of the documents as UTF-8.
        empty: Number of documents that were left out because they have no tokens.
        bad: `FILE:LINE: REASON` of the documents that could not be read.
        position: Position in the input after these documents, as `Document.position`.
        is_dated: Whether a chat template has written the fixed date.
        spelling: Number of conversations that spell a special token, which is encoded as text.
    """

    tokens: np.ndarray
    lengths: list[list[int]]
    text_bytes: int
    empty: int
    bad: list[str]
    position: int
    is_dated: bool = False
    spelling: int = 0


class ChunkEncoder:
    """Maps lists of documents to `EncodedChunk`.

    Args:
        tokenizer: The tokenizer.
        json_key: The key of the text in a JSONL line.
        append_eod: Whether to end each document with `tokenizer.eod`.
        special: Whether text that spells a special token is encoded as that token.
    """

    def __init__(
        self, tokenizer: TokenizerData, json_key: str, append_eod: bool, special: bool = False
    ) -> None:
        self._encode = tokenizer.load(special)
        self._mask = tokenizer.mask
        self._refused = frozenset(() if special else tokenizer.special) | {tokenizer.mask}
        self._json_key = json_key
        self._ending: list[int] = []
        if append_eod:
            assert tokenizer.eod is not None
            self._ending = [tokenizer.eod]
        # A small dtype, because the tokens are sent to the parent, which converts them to
        # Megatron's.
        self._dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32

    def __call__(self, documents: Sequence[Document]) -> EncodedChunk:
        """Encodes one chunk, which must not be empty."""
        arrays, lengths, bad = [], [], []
        text_bytes = empty = 0
        for document in documents:
            try:
                encoded = self._encoded(document)
            except BadDocumentError as error:
                bad.append(str(error))
                continue
            except RecursionError:
                bad.append(str(bad_document(document, "its JSON is nested too deeply")))
                continue
            except Exception as error:  # a bug of this program: the user sees the traceback
                error.add_note(str(bad_document(document, "while this was encoded")))
                raise
            for texts, sequences in encoded:
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

    def _encoded(self, document: Document) -> list[tuple[Sequence[str], list[list[int]]]]:
        """Encodes a document as groups of sequences: (texts, ids of each text) for each group."""
        texts = self._texts(document)
        return [(texts, self._ids(document, texts, self._encode))]

    def _ids(
        self, document: Document, texts: Sequence[str], encode: Callable[[str], list[int]]
    ) -> list[list[int]]:
        """Encodes the texts of a document and checks the ids."""
        try:
            sequences = [encode(text) for text in texts]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # panics of Rust code are not subclasses of Exception
            reason = " ".join(str(error).split())
            raise bad_document(document, f"the tokenizer refuses it: {reason}") from error
        self._check(document, sequences)
        return sequences

    def _check(self, document: Document, sequences: Sequence[list[int]]) -> None:
        """Checks that no text was encoded as a special token.

        Some tokenizers also have special tokens in their ordinary vocabulary, and encode text that
        spells them as these tokens. Training would stop at a mask token, and an end token would end
        a document.
        """
        if any(self._mask in ids for ids in sequences):
            raise bad_document(
                document, f"the text spells the tokenizer's mask token (id {self._mask})"
            )
        for ids in sequences:
            if not self._refused.isdisjoint(ids):
                found = next(i for i in ids if i in self._refused)
                raise bad_document(
                    document,
                    f"the text spells a special token (id {found}), which this tokenizer cannot "
                    "encode as text (--special-tokens if it is meant as that token)",
                )

    def _texts(self, document: Document) -> Sequence[str]:
        """Returns the texts of a document's sequences; if the last one is empty, it is left out."""
        return [document_text(document, self._json_key)]
