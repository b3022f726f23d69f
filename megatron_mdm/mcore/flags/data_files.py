"""Checks the .bin/.idx pairs of training data, and refuses damaged or unsuitable pairs."""

import os
import re
import struct
from argparse import Namespace
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split
from megatron.core.datasets.indexed_dataset import (
    _INDEX_HEADER,
    DType,
    IndexedDataset,
    get_bin_path,
    get_idx_path,
)
from megatron.core.datasets.utils import Split

from megatron_mdm.config import flag
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.checkpoint.files import is_remote
from megatron_mdm.mcore.ranks import is_first_rank

INDEX_PART = 1 << 20  # sequences of an index checked at a time; an index may hold billions
FIRST_DOCUMENTS = 16

# File prefixes and their weights, in the form that Megatron parses.
Blend = tuple[list[str], list[float] | None] | None


def check_data_files(blend: Blend, blend_per_split: list[Any] | None) -> None:
    """Checks every .bin/.idx pair in the result of Megatron's get_blend_and_blend_per_split.

    Raises:
        UserError: names the file.
    """
    prefixes = _prefixes(blend, blend_per_split)
    if not prefixes:
        raise UserError("no data: give --data-path PREFIX (without .bin), or --mock-data")
    for prefix in prefixes:
        if not is_remote(prefix):
            _check_data_file(prefix)


def check_split(split: str | None) -> None:
    """Checks --split. Megatron would use whatever looks like a number in it.

    Raises:
        UserError: --split is not one to three shares, at least one of them above 0.
    """
    if split is None:  # training, validation and test have separate files
        return
    numbers = re.findall(r"[.0-9]+", split)
    between = re.sub(r"[.0-9]+", "", split)
    if (
        not 1 <= len(numbers) <= 3
        or re.search(r"[-+\w]", between)  # a sign or an exponent, which Megatron would ignore
        or not all(re.fullmatch(r"\d+\.?\d*|\.\d+", number) for number in numbers)
        or not any(map(float, numbers))
    ):
        raise UserError(
            f"--split {split} is not three shares of the data, for training, validation and test: "
            "give plain numbers as in 95,5,0"
        )


def check_data_flags(args: Namespace) -> None:
    """Checks that the flags name the data only once, and how they are split.

    Megatron would read one kind of flags and ignore the other, or fail after it has built the
    model.

    Args:
        args: parsed arguments, before or after Megatron validates them.

    Raises:
        UserError: names the flags.
    """
    whole = [flag(name) for name in ("data_path", "data_args_path") if getattr(args, name)]
    names = ("train_data_path", "valid_data_path", "test_data_path", "per_split_data_args_path")
    parts = [flag(name) for name in names if getattr(args, name)]
    if len(whole) > 1 or (whole and parts):
        first, second = (whole + parts)[:2]
        raise UserError(f"{first} and {second} name the data in two ways: leave one out")
    if args.data_args_path and args.split is None:
        raise UserError(
            "--data-args-path needs --split, the shares for training, validation and test: for "
            "example --split 999,1,0"
        )
    if parts and args.split is not None:
        raise UserError(
            f"--split {args.split} does not go with {parts[0]}, which names the data of one part: "
            "leave out --split"
        )


def check_validation(eval_iters: int, split: str | None, blend_per_split: list[Any] | None) -> None:
    """Checks that an evaluation has rows.

    Args:
        eval_iters: iterations of an evaluation, more than 0.
        split: value of --split that `check_split` has accepted.
        blend_per_split: see `check_data_files`.

    Raises:
        UserError: the data flags leave no validation rows.
    """
    if blend_per_split is None:
        has_rows = parse_and_normalize_split(split)[Split.valid.value] > 0
        given = f"--split {split}"
    else:
        given, has_rows = "what the flags name for each split", blend_per_split[1] is not None
    if not has_rows:
        raise UserError(
            f"--eval-iters {eval_iters} needs validation rows, and {given} leaves none: add "
            "--eval-iters 0, or give validation a share"
        )


def check_validation_sets(names: list[str] | None, blend_per_split: list[Any] | None) -> None:
    """Checks --validation-set-names against the files of the sets.

    Args:
        names: names of the sets; None: the flag is not given.
        blend_per_split: see `check_data_files`.

    Raises:
        UserError: a set has no file, or no unique name that TensorBoard can show.
    """
    if names is None:
        return
    files, weights = (blend_per_split and blend_per_split[Split.valid.value]) or ([], None)
    if not files:
        raise UserError(
            "--validation-set-names needs a file for each set: give --valid-data-path, with "
            "--train-data-path instead of --data-path"
        )
    if weights is not None:
        raise UserError(
            "--validation-set-names makes a set of each file of --valid-data-path: leave out the "
            "weights, or the names for one mixture"
        )
    if len(names) != len(files):
        raise UserError(
            f"--validation-set-names gives {len(names)} names, and --valid-data-path has "
            f"{len(files)} files: give one name for each file"
        )
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise UserError(
                f"--validation-set-names {name!r}: a name is part of TensorBoard's; use letters, "
                "digits, and . _ -"
            )
        if names.count(name) > 1:
            raise UserError(f"--validation-set-names gives {name} twice: each set needs its own")


def check_ends_of_documents(blend: Blend, blend_per_split: list[Any] | None, eod_id: int) -> None:
    """Checks that documents end with the end-of-document token, which marks them off in a row.

    It reads only the first documents of each .bin/.idx pair: preprocessing ends all or none.

    Args:
        blend: see `check_data_files`, which has already accepted the files.
        blend_per_split: likewise.
        eod_id: end-of-document token.

    Raises:
        UserError: names the file.
    """
    for prefix in _prefixes(blend, blend_per_split):
        if is_remote(prefix):
            continue
        dataset = IndexedDataset(prefix)
        lasts = (dataset[end - 1] for end in dataset.document_indices[1 : FIRST_DOCUMENTS + 1])
        if not any(len(last) and last[-1] == eod_id for last in lasts):
            raise UserError(
                f"no document at the beginning of {get_bin_path(prefix)} ends with the tokenizer's "
                f"end of document, {eod_id}, which --mdm-isolate-documents and --mdm-rate-per "
                "document need to divide rows: run tools/preprocess_data.py again without "
                "--no-append-eod (Megatron's tool: with --append-eod)"
            )


def check_single_texts(blend: Blend, blend_per_split: list[Any] | None) -> None:
    """Checks that every document is one sequence, as in running text.

    Rows of text take sequences in any order, so a prompt and its response would be separated.

    Args:
        blend: see `check_data_files`, which has already accepted the files.
        blend_per_split: likewise.

    Raises:
        UserError: names the file.
    """
    for prefix in _prefixes(blend, blend_per_split):
        if not is_remote(prefix) and has_several_sequences(prefix):
            raise UserError(
                f"{prefix} holds pairs of prompts and responses: add --mdm-sft to train on them, "
                "or give running text"
            )


def has_several_sequences(prefix: str) -> bool:
    """Whether the documents of an undamaged .bin/.idx pair have several sequences each."""
    with open(get_idx_path(prefix), "rb") as stream:
        stream.seek(len(_INDEX_HEADER))
        _, _, sequences, bounds = struct.unpack("<QBQQ", stream.read(25))
    return bool(bounds != sequences + 1)


def _prefixes(blend: Blend, blend_per_split: list[Any] | None) -> list[str]:
    blends = blend_per_split or [blend]
    return list(dict.fromkeys(p for blend in blends if blend is not None for p in blend[0]))


def _check_data_file(prefix: str) -> None:
    bin_path, idx_path = get_bin_path(prefix), get_idx_path(prefix)
    for path in (bin_path, idx_path):
        if not os.path.isfile(path):
            raise UserError(
                f"{path} does not exist: make it with tools/preprocess_data.py "
                f"--output-prefix {prefix}"
            )
        if os.path.getsize(path) == 0:
            raise UserError(f"{path} is empty: run tools/preprocess_data.py again")
    try:
        expected = indexed_bytes(idx_path)
    except (ValueError, struct.error) as error:
        raise UserError(
            f"{idx_path} is not a Megatron index, or is damaged or cut short ({error}): "
            "run tools/preprocess_data.py again"
        ) from error
    if expected == 0:
        raise UserError(f"{idx_path} lists no documents: run tools/preprocess_data.py again")
    if os.path.getsize(bin_path) != expected:
        raise UserError(
            f"{bin_path} has {os.path.getsize(bin_path)} bytes where its index says {expected}: it "
            "is cut short or belongs to another index; run tools/preprocess_data.py again"
        )


def indexed_bytes(idx_path: str) -> int:
    """The size in bytes that an index implies for its .bin.

    Megatron's IndexedDataset reads the same fields without checking them, and prints an "exception
    ignored" message when it is deleted after a failure.

    Raises:
        ValueError, struct.error: the file is not an index, or contradicts itself.
    """
    with open(idx_path, "rb") as stream:
        if stream.read(len(_INDEX_HEADER)) != _INDEX_HEADER:
            raise ValueError("wrong header")
        version, code, sequences, documents = struct.unpack("<QBQQ", stream.read(25))
        start = stream.tell()
    if version != 1:
        raise ValueError(f"version {version}")
    size = DType.size(DType.dtype_from_code(code))
    expected = start + sequences * (4 + 8) + documents * 8
    if os.path.getsize(idx_path) != expected:
        raise ValueError(f"{os.path.getsize(idx_path)} bytes instead of {expected}")
    if sequences == 0:
        return 0
    lengths = np.memmap(idx_path, np.int32, "r", start, (sequences,))
    pointers = np.memmap(idx_path, np.int64, "r", start + 4 * sequences, (sequences,))
    ends = np.memmap(idx_path, np.int64, "r", start + 12 * sequences, (documents,))
    if documents == 0 or ends[-1] != sequences:
        raise ValueError("its counts of documents and sequences differ")
    starts = range(0, sequences, INDEX_PART)
    if not is_first_rank():  # one full reader is enough: other ranks check only the end
        starts = starts[-1:]
    end = int(pointers[starts[0]]) if starts[0] else 0
    for i in starts:
        part = lengths[i : i + INDEX_PART].astype(np.int64) * size
        after = end + part.cumsum()
        if part.min() < 0 or not np.array_equal(pointers[i : i + INDEX_PART], after - part):
            raise ValueError("its lengths and positions differ")
        end = int(after[-1])
    return end
