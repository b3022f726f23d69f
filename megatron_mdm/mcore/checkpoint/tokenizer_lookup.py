"""Finds the tokenizer of a checkpoint on this machine.

A checkpoint's arguments name the tokenizer by its path. On another machine, or after the original
was removed, that path may not exist or may hold something else. Therefore this module first looks
for the copy that the run kept beside its checkpoints (kept_tokenizer.py).
"""

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from filecmp import cmp
from pathlib import Path
from typing import Any

from megatron.training import checkpointing

from megatron_mdm.data.encoding import TokenizerData, hugging_face_data, open_hugging_face
from megatron_mdm.data.fingerprint import Fingerprint, differs
from megatron_mdm.data.load_tokenizer import load_sentencepiece
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.checkpoint.files import is_remote
from megatron_mdm.mcore.checkpoint.kept_tokenizer import (
    DIRECTORY,
    FILE,
    fetched_before,
    files_of_tokenizer,
    place_of_tokenizer,
)
from megatron_mdm.mcore.device import replaced


def kept_tokenizer(directory: str, args: Namespace) -> str | None:
    """The copy of the tokenizer beside checkpoints; None if there is none.

    A run that was allowed to change its tokenizer has replaced the copy. For an earlier checkpoint,
    the result is None if its tokenizer is still at the original path.

    Args:
        directory: directory that --save named.
        args: arguments of one of its checkpoints, or of a run with such a tokenizer.
    """
    kind, path = args.tokenizer_type, args.tokenizer_model
    if path is None or kind not in (DIRECTORY, *FILE) or is_remote(directory):
        return None
    own = place_of_tokenizer(directory, args)
    is_there = os.path.isdir if kind == DIRECTORY else os.path.isfile
    if not is_there(own):
        return None
    saved = getattr(args, "mdm_tokenizer", None)
    original = path if os.path.exists(path) or kind != DIRECTORY else fetched_before(path)
    if saved is None or original is None or not is_there(original) or _same(own, original):
        return own
    trained_with = Fingerprint(**saved)
    copy, other = _data(own), _data(original)
    is_replaced = copy is not None and differs(trained_with, copy)
    is_original = other is not None and not differs(trained_with, other)
    return None if is_replaced and is_original else own


def _same(one: str, other: str) -> bool:
    """Whether two tokenizers, both files or both directories, are equal byte for byte."""
    if os.path.isfile(one):
        return cmp(one, other, shallow=False)
    first, second = (
        {p.relative_to(x): p for p in files_of_tokenizer(Path(x))} for x in (one, other)
    )
    return first.keys() == second.keys() and all(
        cmp(path, second[name], shallow=False) for name, path in first.items()
    )


def _data(path: str) -> TokenizerData | None:
    """A tokenizer in the form that preprocessing uses; None if preprocessing does not support it.

    This function runs no code from the tokenizer's directory.
    """
    if os.path.isfile(path):
        with suppress(UserError):
            return load_sentencepiece(path)
        return None
    try:
        tokenizer = open_hugging_face(path)
    except Exception:  # of many kinds; the code that opens the chosen tokenizer reports the error
        return None
    return hugging_face_data(tokenizer) if tokenizer.is_fast else None


def tokenizer_of(directory: str, args: Namespace) -> str | None:
    """The path of a checkpoint's tokenizer on this machine. Nothing is downloaded.

    Args:
        directory: directory of the checkpoint.
        args: arguments in the checkpoint.

    Returns:
        The copy beside the checkpoint, else the path in its arguments if that exists, else None.
    """
    kind, path = args.tokenizer_type, args.tokenizer_model
    own = kept_tokenizer(directory, args)
    if own is not None or path is None or os.path.exists(path):
        return own or path
    if kind == DIRECTORY:
        return fetched_before(path)
    return None if kind in FILE else path


def check_tokenizer_path(args: Namespace) -> None:
    """Checks, before Megatron opens --tokenizer-model, that it exists or may be on the hub.

    Args:
        args: parsed arguments.

    Raises:
        UserError: neither is the case; the line names the copy beside the checkpoint to be loaded,
            if there is one.
    """
    path, kind = args.tokenizer_model, args.tokenizer_type
    is_from_checkpoint = args.use_checkpoint_args and args.use_tokenizer_model_from_checkpoint_args
    if path is None or kind not in (DIRECTORY, *FILE) or os.path.exists(path) or is_from_checkpoint:
        return
    if kind == DIRECTORY and _may_be_on_hub(path):
        return
    own = _copy_to_load(args)
    if own:
        raise UserError(
            f"--tokenizer-model {path} does not exist: give the copy beside the checkpoint, "
            f"--tokenizer-model {own}"
        )
    if kind in FILE:
        raise UserError(f"--tokenizer-model {path} does not exist: give the path of its file")


def tokenizer_rejection(error: Exception, args: Namespace) -> UserError | None:
    """One line for Megatron's exception about a --tokenizer-model that does not exist.

    Args:
        error: exception that Megatron raised.
        args: parsed arguments.

    Returns:
        None if the exception is about something else, or if there is no copy to name.
    """
    path = args.tokenizer_model
    is_about_it = path is not None and f"AutoTokenizer for {path}." in str(error)
    own = _copy_to_load(args) if is_about_it and not os.path.exists(path) else None
    if own is None:
        return None
    return UserError(
        f"--tokenizer-model {path} does not exist, and transformers finds no tokenizer of this "
        f"name: give the copy beside the checkpoint, --tokenizer-model {own}"
    )


def _may_be_on_hub(path: str) -> bool:
    try:
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(path)
    except (ImportError, ValueError):
        return False
    return True


def _copy_to_load(args: Namespace) -> str | None:
    """The copy beside the checkpoint that a run is about to load; None if there is none."""
    places = (args.load, args.pretrained_checkpoint)
    found = (kept_tokenizer(place, args) for place in places if place)
    return next((own for own in found if own), None)


@contextmanager
def checkpoints_bring_tokenizers() -> Iterator[None]:
    """Context in which --use-checkpoint-args uses the copy of the tokenizer beside the checkpoint.

    Megatron uses the path in the checkpoint's arguments.
    """
    load_arguments = checkpointing.load_args_from_checkpoint

    def load_with_tokenizer(args: Namespace, load_arg: str = "load", **options: Any) -> Any:
        found = load_arguments(args, load_arg=load_arg, **options)
        directory = getattr(args, load_arg)
        if directory is not None and args.use_tokenizer_model_from_checkpoint_args:
            saved = found[1] if isinstance(found, tuple) else None  # None: no checkpoint
            trained_with = getattr(saved, "mdm_tokenizer", None)
            own = kept_tokenizer(
                directory, Namespace(**vars(args) | {"mdm_tokenizer": trained_with})
            )
            args.tokenizer_model = own or args.tokenizer_model
        return found

    with replaced(checkpointing, "load_args_from_checkpoint", load_with_tokenizer):
        yield
