"""Reads and changes the tokenizer files of a Hugging Face directory.

The `tokenizers` library, and with it preprocessing and Megatron, reads `tokenizer.json`.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_mdm.conversion import safetensors_model
from megatron_mdm.data.encoding import (
    TokenizerData,
    hugging_face_data,
    named_code,
    open_hugging_face,
    sentencepiece_data,
)
from megatron_mdm.errors import UserError
from megatron_mdm.libraries import TRANSFORMERS

MASK_TOKEN = "<|mask|>"
# Tokenizer classes that read vocab.json and merges.txt as Qwen2's class does.
QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "DreamTokenizer")

Pairs = Iterable[tuple[Any, Any]]


def tokenizer_size(directory: Path) -> int | None:
    """Returns the largest token id in the tokenizer's files plus 1, None without a tokenizer.

    Raises:
        UserError: a file is damaged.
    """
    ids = tokens_of(directory).values()
    return max(ids) + 1 if ids else None


def tokens_of(path: Path) -> dict[str, int]:
    """Reads token -> id of a tokenizer on disk; empty if there is none.

    Args:
        path: a directory with a tokenizer's files, or a sentencepiece model.

    Raises:
        UserError: a file is damaged.
    """
    if path.is_dir():
        tokens = dict(_named_tokens(path))
        model = path / "tokenizer.model"
        has_vocabulary = any((path / name).exists() for name in ("tokenizer.json", "vocab.json"))
        return tokens if has_vocabulary or not model.exists() else {**_pieces(model), **tokens}
    return _pieces(path) if path.exists() else {}


def _processor(model: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(str(model))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{model} is not a sentencepiece model: copy it again") from error


def _pieces(model: Path) -> dict[str, int]:
    processor = _processor(model)
    return {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}


def _named_tokens(directory: Path) -> Iterator[tuple[str, int]]:
    """Yields every token of every file with its id; a token may occur twice."""
    for name, read in _READERS.items():
        path = directory / name
        if not path.exists():
            continue
        with _damage(path):
            for token, i in read(safetensors_model.read_object(path)):
                if not isinstance(token, str) or type(i) is not int or i < 0:
                    raise ValueError(f"{token!r}: {i!r}")
                yield token, i


def _of_tokenizer_json(content: dict[str, Any]) -> Pairs:
    vocab = content["model"]["vocab"]
    yield from (
        vocab.items() if isinstance(vocab, dict) else ((item[0], i) for i, item in enumerate(vocab))
    )
    for token in content.get("added_tokens") or ():
        yield token["content"], token["id"]


def _of_settings(content: dict[str, Any]) -> Pairs:
    for i, token in (content.get("added_tokens_decoder") or {}).items():
        yield token["content"], int(i)


_READERS: dict[str, Callable[[dict[str, Any]], Pairs]] = {
    "tokenizer.json": _of_tokenizer_json,
    "vocab.json": dict.items,
    "added_tokens.json": dict.items,
    "tokenizer_config.json": _of_settings,
}


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turns errors from contents of an unexpected form into a `UserError` about the file."""
    try:
        yield
    except UserError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a tokenizer's ({type(error).__name__}: {error}): copy it again"
        ) from error


def known_mask(directory: Path) -> str | None:
    """Tells the user how to use the mask token that a tokenizer's files name.

    Args:
        directory: directory with the tokenizer's files, whose config.json names no mask token.

    Returns:
        The advice, None if the files name no mask token or give it no id.

    Raises:
        UserError: a file is damaged.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        mask = _object(directory / name).get("mask_token")
        token = mask.get("content") if isinstance(mask, dict) else mask
        if not isinstance(token, str):
            continue
        number = tokens_of(directory).get(token)
        if number is not None:
            return (
                f"the tokenizer has the mask token {token} with id {number} already: add "
                f'"mask_token_id": {number} to config.json, and "mdm_shift": false if the logits '
                "of position i predict token i"
            )
    return None


def add_mask_token(directory: Path, mask: int) -> None:
    """Adds the mask token to the tokenizer files of a directory; without a tokenizer, does nothing.

    Raises:
        UserError: the tokenizer has no tokenizer.json, has the token already, or would give it
            another id.
    """
    path = directory / "tokenizer.json"
    if tokenizer_size(directory) is None:
        return
    if not path.exists():
        raise UserError(
            "--add-mask-token needs the tokenizer's tokenizer.json: load it with transformers' "
            "AutoTokenizer and save it with save_pretrained first"
        )
    tokenizer = safetensors_model.read_object(path)
    token = {
        "content": MASK_TOKEN,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    if any(name == MASK_TOKEN for name, _ in _named_tokens(directory)):
        raise UserError(f"--add-mask-token: the tokenizer has {MASK_TOKEN} already")
    tokenizer["added_tokens"] = [*(tokenizer.get("added_tokens") or ()), {"id": mask, **token}]
    _write(path, tokenizer)
    backend = _transformers().PreTrainedTokenizerFast(tokenizer_file=str(path))
    given = backend.convert_tokens_to_ids(MASK_TOKEN)
    if given != mask:
        raise UserError(
            f"--add-mask-token: the tokenizer's ids have holes, so that {MASK_TOKEN} would become "
            f"token {given} and not {mask}: add a mask token to the tokenizer yourself, and its id "
            "as mask_token_id to config.json"
        )
    settings = _settings(directory)
    settings["mask_token"] = MASK_TOKEN
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"][str(mask)] = token
    _write(directory / "tokenizer_config.json", settings)
    special = directory / "special_tokens_map.json"
    if special.exists():
        _write(special, safetensors_model.read_object(special) | {"mask_token": MASK_TOKEN})


def write_fast_tokenizer(directory: Path) -> None:
    """Writes tokenizer.json for a tokenizer that only has Qwen2's vocab.json and merges.txt.

    Dream is released in this form, with Python code that reads the files. Preprocessing does not
    run that code. Every token keeps its id. Other tokenizers stay unchanged.

    Args:
        directory: directory with the tokenizer's files, which are changed.

    Raises:
        UserError: the files do not describe one tokenizer.
    """
    settings = _settings(directory)
    if (
        settings.get("tokenizer_class") not in QWEN2_CLASSES
        or (directory / "tokenizer.json").exists()
        or not all((directory / name).exists() for name in ("vocab.json", "merges.txt"))
    ):
        return
    transformers = _transformers()
    named = list(_named_tokens(directory))
    try:
        built = transformers.Qwen2TokenizerFast.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the type of the exception depends on the fault
        raise UserError(
            "the tokenizer's vocab.json and merges.txt make no byte-level BPE "
            f"({' '.join(str(error).split())}): copy them again"
        ) from error
    ids, known = built.get_vocab(), {token for token, _ in named}
    nowhere = [(token, "no id") for token in built.all_special_tokens if token not in known]
    for token, i in [*named, *nowhere]:
        if ids.get(token) != i:
            raise UserError(
                f"{token!r} has {i} in one of the tokenizer's files and {ids.get(token)} in the "
                "tokenizer that all of them make: copy the files of one tokenizer"
            )
    built.backend_tokenizer.save(str(directory / "tokenizer.json"))
    settings.pop("auto_map", None)
    ours = {"tokenizer_class": "PreTrainedTokenizerFast", **built.special_tokens_map}
    _write(directory / "tokenizer_config.json", settings | ours)


def _settings(directory: Path) -> dict[str, Any]:
    return _object(directory / "tokenizer_config.json")


def _object(path: Path) -> dict[str, Any]:
    """Returns a file's JSON object, an empty one if there is no file."""
    return safetensors_model.read_object(path) if path.exists() else {}


def code_of(directory: Path) -> str | None:
    """Returns the tokenizer's own Python class as `module.Class`, None if it has none."""
    with _damage(directory / "tokenizer_config.json"):
        return next(iter(named_code(_settings(directory))), None)


def leave_out_code(directory: Path) -> str | None:
    """Makes a directory use tokenizer.json instead of the Python code that its settings name.

    The files with the code stay, but the settings no longer name them.

    Args:
        directory: directory with the tokenizer's files, which are changed.

    Returns:
        The class that is no longer used, None if there is none.

    Raises:
        UserError: the directory has Python code and no tokenizer.json.
    """
    code = code_of(directory)
    if code is None:
        return None
    if not (directory / "tokenizer.json").exists():
        raise UserError(
            f"the tokenizer is Python code ({code}), and has no tokenizer.json that could be taken "
            "instead: add --trust-remote-code if you trust the code"
        )
    settings = _settings(directory)
    settings.pop("auto_map")
    _write(
        directory / "tokenizer_config.json",
        settings | {"tokenizer_class": "PreTrainedTokenizerFast"},
    )
    return code


def data_of(path: Path) -> TokenizerData | None:
    """Loads a tokenizer's data as training does.

    Args:
        path: a directory with the tokenizer's files, or a sentencepiece model. Python code in the
            directory is not run.

    Returns:
        The data. None if there is no tokenizer, if transformers is not installed, or if
        preprocessing does not support the tokenizer.

    Raises:
        UserError: the tokenizer cannot be loaded.
    """
    if path.is_file():
        return sentencepiece_data(_processor(path))
    is_there = tokenizer_size(path) is not None and code_of(path) is None
    if not is_there or not TRANSFORMERS.is_installed():
        return None
    try:
        tokenizer = open_hugging_face(str(path))
    except Exception as error:  # the type of the exception depends on the fault
        raise UserError(
            f"transformers cannot load the tokenizer ({' '.join(str(error).split())}): copy its "
            "files again, or take them away to train on token ids (--tokenizer-type NullTokenizer)"
        ) from error
    return hugging_face_data(tokenizer) if tokenizer.is_fast else None


def _transformers() -> Any:
    """Imports transformers, which also brings the `tokenizers` package."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"the tokenizer needs the transformers package: {TRANSFORMERS.install}"
        ) from error
    return transformers


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
