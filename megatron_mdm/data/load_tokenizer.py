"""Loads tokenizers for preprocessing: a sentencepiece model or a Hugging Face tokenizer."""

import os

from megatron_mdm.data.encoding import (
    TokenizerData,
    hugging_face_data,
    open_hugging_face,
    sentencepiece_data,
)
from megatron_mdm.errors import UserError
from megatron_mdm.libraries import TRANSFORMERS


def load_sentencepiece(path: str) -> TokenizerData:
    """Reads a sentencepiece model file.

    Raises:
        UserError: The file is missing or is not a sentencepiece model.
    """
    import sentencepiece

    try:
        with open(path, "rb") as file:
            model = file.read()
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(model)  # raises for an empty file, too
    except OSError as error:
        raise UserError(f"--tokenizer-model {path}: {error.strerror or error}") from error
    except RuntimeError as error:
        raise UserError(f"--tokenizer-model {path}: not a sentencepiece model") from error
    return sentencepiece_data(processor)


def load_hugging_face(directory: str, trust: bool = False) -> TokenizerData:
    """Reads a Hugging Face tokenizer from a local directory; nothing is downloaded.

    The end-of-document token is the tokenizer's eos token, as in Megatron.

    Args:
        directory: Directory with the tokenizer's files.
        trust: Whether to run Python code in the directory.

    Raises:
        UserError: transformers is not installed, the directory is missing or has no tokenizer, or
            the tokenizer has no `tokenizers` backend (it is not a fast one).
    """
    if not os.path.isdir(directory):
        raise UserError(f"--hf-tokenizer {directory}: no such directory")
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--hf-tokenizer needs the transformers package: {TRANSFORMERS.install}"
        ) from error
    try:
        tokenizer = open_hugging_face(directory, trust)
    except Exception as error:  # the type of the exception depends on the fault
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"--hf-tokenizer {directory}: cannot be loaded ({lines[0].rstrip(' :')}); it needs the "
            "files that save_pretrained() writes, tokenizer.json among them"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"--hf-tokenizer {directory}: not a fast tokenizer (one with a tokenizer.json); "
            "for a sentencepiece model use --tokenizer-model"
        )
    return hugging_face_data(tokenizer)


def has_chat_template(directory: str) -> bool:
    """Whether the Hugging Face tokenizer in a local directory has a chat template."""
    return open_hugging_face(directory).chat_template is not None
