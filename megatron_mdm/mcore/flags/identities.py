"""Identifies the data and the tokenizer of a run by content, not only by file names.

A checkpoint holds `mdm_data` and `mdm_tokenizer`, so a run that resumes can tell whether its files
are still those that it began with. Only the first rank reads the files. It sends the result to the
other ranks when they are connected.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from megatron_mdm.data.encoding import TokenizerData
from megatron_mdm.data.fingerprint import Fingerprint, differs, fingerprint
from megatron_mdm.data.identity import data_identity
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.checkpoint.files import is_remote
from megatron_mdm.mcore.flags.data_files import Blend
from megatron_mdm.mcore.ranks import is_first_rank, notice
from megatron_mdm.mcore.tokenizer import tokenizer_data

PARTS = ("train", "valid", "test")
# The values of `mdm_data` and `mdm_tokenizer`; None: unknown on this rank.
Identities = tuple[list[dict[str, Any]] | None, dict[str, Any] | None]


def identities(
    args: Namespace, blend: Blend, parts: list[Blend] | None, tokenizer: Any
) -> Identities:
    """The identities of the data and the tokenizer on the first rank; None on other ranks.

    Args:
        args: arguments of the run; not changed.
        blend: files for all parts of the data together, with weights; or None.
        parts: files for each part of the data, or None. `blend` and `parts` are the results of
            Megatron's get_blend_and_blend_per_split.
        tokenizer: Megatron's tokenizer.

    Raises:
        UserError: a file was made with another tokenizer, and --mdm-allow-flag-change is missing.
    """
    if not is_first_rank():
        return None, None
    known = tokenizer_data(tokenizer)
    own = known
    if known is not None and not isinstance(known, Fingerprint):
        own = fingerprint(known)
    named = [("all", blend)] if parts is None else list(zip(PARTS, parts, strict=True))
    sets = getattr(args, "mdm_validation_sets", None)
    data = [
        {
            "part": f"{part} {sets[i]}" if sets and part == "valid" else part,
            "prefix": prefix,
            "weight": weight,
            **_identity(prefix),
        }
        for part, files in named
        if files is not None
        for i, (prefix, weight) in enumerate(zip(files[0], _shares(*files), strict=True))
    ]
    compared: list[dict[str, Any] | None] = []
    for entry in data:
        if entry.get("tokenizer") in compared:  # among thousands of files most have the same one
            continue
        compared.append(entry.get("tokenizer"))
        line = other_tokenizer_of_data(entry["prefix"], entry.get("tokenizer"), known)
        if line and not args.mdm_allow_flag_change:
            raise UserError(f"{line}, or add --mdm-allow-flag-change")
        if line:
            notice(line)
    return data, None if own is None else asdict(own)


def _shares(prefixes: list[str], weights: list[float] | None) -> list[float | None]:
    """Weights of files, which sum to 1; None for files without weights, which count by length."""
    if len(prefixes) == 1:
        return [1.0]
    if weights is None:
        return [None] * len(prefixes)
    return [round(weight / sum(weights), 9) for weight in weights]


def _identity(prefix: str) -> dict[str, Any]:
    return {} if is_remote(prefix) else asdict(data_identity(prefix))


def other_tokenizer_of_data(
    prefix: str, made_with: Mapping[str, Any] | None, tokenizer: TokenizerData | Fingerprint | None
) -> str:
    """Describes the other tokenizer that a file was made with.

    Args:
        prefix: prefix of the .bin/.idx pair.
        made_with: the fingerprint in its record; None if there is none.
        tokenizer: see `tokenizer_data`.

    Returns:
        A line; empty if the tokenizer is the same or unknown.
    """
    if made_with is None or tokenizer is None:
        return ""
    difference = differs(Fingerprint(**made_with), tokenizer)
    return difference and (
        f"{prefix} was made with another tokenizer than this one: {difference}. Run "
        "tools/preprocess_data.py with this tokenizer, or give the tokenizer of the data"
    )


def other_tokenizer(saved: Mapping[str, Any], tokenizer: Any) -> str:
    """Describes how a tokenizer differs from a checkpoint's; empty if it is the same or unknown.

    Args:
        saved: the checkpoint's arguments.
        tokenizer: Megatron's tokenizer.
    """
    trained_with, known = saved.get("mdm_tokenizer"), tokenizer_data(tokenizer)
    if trained_with is None or known is None:
        return ""
    return differs(Fingerprint(**trained_with), known)


def check_tokenizer(args: Namespace, saved: Mapping[str, Any], source: str, tokenizer: Any) -> None:
    """Compares the tokenizer with the tokenizer of the checkpoint that is about to be loaded.

    Raises:
        UserError: they differ, and --mdm-allow-flag-change is missing.
    """
    difference = other_tokenizer(saved, tokenizer) if is_first_rank() else ""
    if difference:
        line = f"the checkpoint in {source} was trained with another tokenizer: {difference}"
        if not args.mdm_allow_flag_change:
            raise UserError(f"{line}. Give its tokenizer, or add --mdm-allow-flag-change")
        notice(line)


def check_same_data(args: Namespace, saved: Mapping[str, Any]) -> None:
    """Compares the data with the data of the checkpoint that is about to be resumed.

    Raises:
        UserError: they differ, and --mdm-allow-flag-change is missing.
    """
    before = saved.get("mdm_data")
    is_resumed = args.load is not None and not args.finetune
    if not is_resumed or before is None or args.mdm_data is None:
        return
    line = _other_data(before, args.mdm_data)
    if line and not args.mdm_allow_flag_change:
        raise UserError(
            f"the checkpoint in {args.load} was trained on other data: {line}. Give the same data, "
            "or add --mdm-allow-flag-change (or --finetune for a new run)"
        )
    if line:
        notice(f"the run resumes on other data: {line}")


def _other_data(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    if len(before) != len(now):
        return f"there were {len(before)} files and are {len(now)} now"
    for one, other in zip(before, now, strict=True):
        where = f"{other['prefix']} (in the checkpoint {one['prefix']})"
        if one["prefix"] == other["prefix"]:
            where = other["prefix"]
        if (one["part"], one["weight"]) != (other["part"], other["weight"]):
            was, is_now = (f"{x['part']}, weight {x['weight']}" for x in (one, other))
            return f"{where} is of another part or weight: {is_now}, in the checkpoint {was}"
        known = [name for name in ("full", "quick") if one.get(name) and other.get(name)]
        if known and one[known[0]] != other[known[0]]:
            return f"{where} holds something else than it did"
        if not known and one["prefix"] != other["prefix"]:  # in an object storage
            return f"{where} is another file"
    return ""


def share_identities(args: Namespace) -> None:
    """Broadcasts the identities from the first rank to all ranks; a collective call."""
    if torch.distributed.is_initialized():
        found = [getattr(args, "mdm_data", None), getattr(args, "mdm_tokenizer", None)]
        torch.distributed.broadcast_object_list(found, src=0)
        args.mdm_data, args.mdm_tokenizer = found


def cache_keys(args: Namespace) -> dict[str, str]:
    """Maps each prefix to a digest of its content, for the keys of Megatron's index cache."""
    entries = getattr(args, "mdm_data", None) or []  # older checkpoints do not have it
    return {e["prefix"]: e.get("full") or e["quick"] for e in entries if e.get("quick")}
