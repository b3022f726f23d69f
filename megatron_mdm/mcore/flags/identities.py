"""What the data and the tokenizer of a run are, beyond the names of their files.

A checkpoint holds `mdm_data` and `mdm_tokenizer`, so that a run that resumes can tell whether its
files still are the ones that it began with. The first rank alone reads the files, and the others
learn from it when the ranks are connected.
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
# The values of `mdm_data` and `mdm_tokenizer`; None: not known on this rank.
Identities = tuple[list[dict[str, Any]] | None, dict[str, Any] | None]


def identities(
    args: Namespace, blend: Blend, parts: list[Blend] | None, tokenizer: Any
) -> Identities:
    """What the data and the tokenizer are, on the first rank; on others None.

    Args:
        args: of the run, which stay as they are.
        blend: the files of all parts of the data, and their weights, or
        parts: those of each part (Megatron's get_blend_and_blend_per_split).
        tokenizer: Megatron's.

    Raises:
        UserError: a file was made with another tokenizer, unless --mdm-allow-flag-change.
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
        if entry.get("tokenizer") in compared:  # of thousands of files most have the same
            continue
        compared.append(entry.get("tokenizer"))
        line = other_tokenizer_of_data(entry["prefix"], entry.get("tokenizer"), known)
        if line and not args.mdm_allow_flag_change:
            raise UserError(f"{line}, or add --mdm-allow-flag-change")
        if line:
            notice(line)
    return data, None if own is None else asdict(own)


def _shares(prefixes: list[str], weights: list[float] | None) -> list[float | None]:
    """Weights of files that add to 1; None for files without, which count by their lengths."""
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
    """Says with which other tokenizer data were made, empty if not or if it is not known.

    Args:
        prefix: of the .bin/.idx pair.
        made_with: the fingerprint in its record, None without one.
        tokenizer: see `tokenizer_data`.
    """
    if made_with is None or tokenizer is None:
        return ""
    difference = differs(Fingerprint(**made_with), tokenizer)
    return difference and (
        f"{prefix} was made with another tokenizer than this one: {difference}. Run "
        "tools/preprocess_data.py with this tokenizer, or give the one that the data has"
    )


def other_tokenizer(saved: Mapping[str, Any], tokenizer: Any) -> str:
    """Says how a tokenizer differs from that of a checkpoint, empty if not or if it is not known.

    Args:
        saved: the checkpoint's arguments.
        tokenizer: Megatron's.
    """
    trained_with, known = saved.get("mdm_tokenizer"), tokenizer_data(tokenizer)
    if trained_with is None or known is None:
        return ""
    return differs(Fingerprint(**trained_with), known)


def check_tokenizer(args: Namespace, saved: Mapping[str, Any], source: str, tokenizer: Any) -> None:
    """Compares the tokenizer with that of the checkpoint that is about to be loaded.

    Raises:
        UserError: it is another one, unless --mdm-allow-flag-change.
    """
    difference = other_tokenizer(saved, tokenizer) if is_first_rank() else ""
    if difference:
        line = f"the checkpoint in {source} was trained with another tokenizer: {difference}"
        if not args.mdm_allow_flag_change:
            raise UserError(f"{line}. Give its tokenizer, or add --mdm-allow-flag-change")
        notice(line)


def check_same_data(args: Namespace, saved: Mapping[str, Any]) -> None:
    """Compares the data with those of the checkpoint that is about to be resumed.

    Raises:
        UserError: they are others, unless --mdm-allow-flag-change.
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
        return f"there were {len(before)} files and are {len(now)}"
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
    """Tells all ranks what the first one has found; a collective call where there are several."""
    if torch.distributed.is_initialized():
        found = [getattr(args, "mdm_data", None), getattr(args, "mdm_tokenizer", None)]
        torch.distributed.broadcast_object_list(found, src=0)
        args.mdm_data, args.mdm_tokenizer = found


def cache_keys(args: Namespace) -> dict[str, str]:
    """Prefix -> what tells its content, for the keys of Megatron's index cache."""
    entries = getattr(args, "mdm_data", None) or []  # a checkpoint may be older than this
    return {e["prefix"]: e.get("full") or e["quick"] for e in entries if e.get("quick")}
