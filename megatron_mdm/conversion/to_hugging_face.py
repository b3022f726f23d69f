"""Converts Megatron checkpoints, written under any parallel layout, to Hugging Face safetensors."""

import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_mdm.conversion import megatron_model, safetensors_model
from megatron_mdm.conversion.common import (
    Pair,
    cast,
    check_space,
    escaping,
    pair_tensors,
    progress,
    write_hub_files,
)
from megatron_mdm.conversion.common import verify as verify_tensors
from megatron_mdm.conversion.config import Config
from megatron_mdm.conversion.families import detect
from megatron_mdm.conversion.family import Family, mask_token_id, model_flags, shift_first, shifted
from megatron_mdm.conversion.layout import Heads, keeps_its_dtype, split
from megatron_mdm.conversion.logits import compare_logits
from megatron_mdm.conversion.tokenizer import data_of, tokens_of
from megatron_mdm.conversion.torch_dist import DistCheckpoint
from megatron_mdm.conversion.vocabulary import TENSORS, Vocabulary, embedding_rows
from megatron_mdm.data.fingerprint import Fingerprint, differs
from megatron_mdm.errors import UserError
from megatron_mdm.files import new_directory
from megatron_mdm.hub_files import HUB_FILES
from megatron_mdm.mcore.checkpoint.tokenizer_lookup import tokenizer_of
from megatron_mdm.mcore.flags.architecture import differences
from megatron_mdm.mcore.flags.hybrid_pattern import model_class
from megatron_mdm.mcore.flags.resume import last_block_size

# The file that SGLang reads with --dllm-algorithm-config (python/sglang/srt/dllm/config.py).
SGLANG_FILE = "sglang.yaml"


def to_hugging_face(
    source: str,
    output: str,
    *,
    config_from: str | None = None,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    trust: bool = False,
    hashes: bool = True,
    log: Callable[[str], object] = print,
) -> None:
    """Converts a Megatron torch_dist checkpoint to Hugging Face safetensors.

    Args:
        source: checkpoint directory.
        output: model directory to create.
        config_from: directory with config.json and tokenizer; None for the one in the checkpoint,
            or the directory of the run's tokenizer.
        iteration: iteration of the checkpoint; None for the last.
        dtype: dtype to write; None for the checkpoint's.
        verify: read the output again and compare its tensors and logits.
        trust: the comparison may run the modeling code beside config.json.
        hashes: compare the checkpoint's files with the checksums that were saved with them.
        log: prints a line for the user.

    Raises:
        UserError: config.json describes another model than the checkpoint, or the checkpoint is
            damaged.
    """
    log_line = escaping(log)
    with new_directory(output) as temporary:
        checkpoint = DistCheckpoint(Path(source), iteration, hashes)
        log_line(f"checkpoint: {source}, {checkpoint.name}")
        args = checkpoint.args
        directory = _hub_directory(Path(source), args, config_from)
        config = safetensors_model.read_object(directory / "config.json")
        family = detect(config)
        safetensors_model.check_no_adapter(directory)
        _check_same_model(family, config, args, directory, source)
        heads = Heads(args.num_attention_heads, args.num_query_groups)
        rows = embedding_rows(config)
        mask = _mask_token(family, config, args, rows, directory)
        where = str(checkpoint.path)
        tensor_pairs = pair_tensors(family, config, checkpoint.shapes, heads, rows, where)
        padded = checkpoint.shapes[TENSORS[0]][0]
        tokenizer = _run_tokenizer(args, Path(source))
        _check_unchanged(args, tokenizer or directory)
        tokens = tokens_of(tokenizer) if tokenizer else {}
        check_rows(args, tokens, rows, padded, directory)
        for line in _compare_tokenizers(args, tokens, directory, mask):
            log_line(line)

        parameters = sum(pair.parameters for pair in tensor_pairs)
        blocks = last_block_size(args, checkpoint.iteration)

        def dtype_of(pair: Pair) -> torch.dtype:
            own = checkpoint.dtype(pair.places[0].key)
            return own if dtype is None or keeps_its_dtype(pair.target) else dtype

        def make(pair: Pair) -> list[torch.Tensor]:
            tensor = checkpoint.read(pair.places[0])
            if pair.target in TENSORS:
                tensor = tensor[:rows]
            parts = split(pair.target, tensor, len(pair.names), heads)
            named = zip(pair.names, parts, strict=True)
            return [cast(part, dtype_of(pair), name) for name, part in named]

        outputs = [
            safetensors_model.Output(
                pair.names,
                pair.shapes,
                dtype_of(pair),
                partial(make, pair),
            )
            for pair in tensor_pairs
        ]
        dtypes = {dtype_of(pair) for pair in tensor_pairs if not keeps_its_dtype(pair.target)}
        widest = str(max(dtypes, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")
        dtype_keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]
        written: dict[str, Any] = {
            **config,
            **dict.fromkeys(dtype_keys, widest),
            **_positions(family, config, args),
            **_shift(family, config, args, mask, blocks),
            **block_entry(family, config, blocks),
        }
        vocab = Vocabulary(rows, rows, padded, mask)
        write_hub_files(directory, Path(temporary), family, written, vocab)
        if blocks is not None and family.in_sglang:
            write_sglang_file(Path(temporary, SGLANG_FILE), blocks)
        total = sum(item.bytes for item in outputs)
        check_space(temporary, total)
        with progress(total, "converting") as advance:
            for size in safetensors_model.write_model(Path(temporary), outputs):
                advance(size)
        if verify:
            model = safetensors_model.HubModel(Path(temporary))

            def read_back(pair: Pair) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
                for name, part in zip(pair.names, make(pair), strict=True):
                    yield name, model.read(name), part

            verify_tensors(tensor_pairs, read_back, log_line)
            compare_logits(
                family,
                config,
                Path(temporary),
                checkpoint.path,
                rows,
                padded=padded,
                parameters=parameters,
                dtype=dtype,
                trust=trust,
                log=log_line,
                model=model_class(vars(args)),
            )
    if family.in_transformers and mask is not None:
        log_line(
            f"transformers runs {family.architecture} with causal attention: to fill in masks, "
            'load it with attn_implementation="eager" and call it with an attention_mask '
            + (
                "of zeros, torch.zeros(b, 1, s, s), which hides nothing"
                if blocks is None
                else "[b, 1, s, s] that is -inf where a key is in a later block, else 0"
            )
        )
    if written.get("mdm_shift"):
        others = "" if family.shifted or family.in_transformers else ", which only this code reads"
        log_line(f"the logits of position i - 1 are for token i (mdm_shift in config.json{others})")
    for key, positions in _positions(family, config, args).items():
        log_line(f"{key} in config.json is {positions}, as in the run, and was {config[key]}")
    for line in _about_blocks(family, blocks, output):
        log_line(line)
    if padded > rows:
        is_seen = getattr(args, "mdm_vocab_size", None) is None
        seen = ", which took part in the run's softmax" if is_seen else ""
        log_line(f"left out {padded - rows} padding rows of the vocabulary{seen}")
    log_line(f"{output}: {family.name} ({family.architecture}), {parameters:,} parameters")


def _check_same_model(
    family: Family, config: Config, args: Namespace, directory: Path, source: str
) -> None:
    """Checks that the checkpoint's arguments build the model that config.json describes."""
    flags = [*model_flags(family, config), "--padded-vocab-size", str(args.padded_vocab_size)]
    # On the CPU, HybridModel's layers have all that a checkpoint of its layers may have.
    local = ["--transformer-impl", "local"]
    expected = megatron_model.arguments([*flags, "--mdm-model", model_class(vars(args)), *local])
    # The run chooses which token a position predicts; it is not a property of the model's shapes.
    described = {name: value for name, value in vars(expected).items() if name != "mdm_shift"}
    wrong = differences(vars(args), described, "config.json")
    if wrong:
        raise UserError(
            f"the checkpoint in {source} is not the model of {directory / 'config.json'}: {wrong}. "
            "Give its config.json with --hf-config"
        )


def _run_tokenizer(args: Namespace, source: Path) -> Path | None:
    """Returns the path of the run's tokenizer, None if it is not on this disk."""
    if args.tokenizer_type not in ("SentencePieceTokenizer", "HuggingFaceTokenizer"):
        return None
    path = tokenizer_of(str(source), args)
    return None if path is None else Path(path)


def _check_unchanged(args: Namespace, path: Path) -> None:
    """Checks that a tokenizer is the one of the training, if the checkpoint has its fingerprint.

    Raises:
        UserError: it is another tokenizer.
    """
    saved, tokenizer = getattr(args, "mdm_tokenizer", None), data_of(path)
    if saved is None or tokenizer is None:
        return
    trained_with = Fingerprint(**saved)
    if tokenizer.kind != trained_with.kind:
        return  # another kind may have the same tokens; `_compare_tokenizers` compares them
    difference = differs(trained_with, tokenizer)
    if difference:
        raise UserError(
            f"the tokenizer {path} is not the one that the checkpoint was trained with: "
            f"{difference}. Put that one back"
        )


def check_rows(
    args: Namespace, tokens: Mapping[str, int], rows: int, padded: int, directory: Path
) -> None:
    """Checks that the conversion leaves out no row of a token.

    Args:
        args: arguments of the run.
        tokens: token -> id of the run's tokenizer, empty if it is not known.
        rows: number of rows in config.json.
        padded: number of rows in the checkpoint.
        directory: directory of config.json.

    Raises:
        UserError: config.json has fewer rows than the run has tokens, or more than the checkpoint.
    """
    path = directory / "config.json"
    if padded < rows:
        raise UserError(
            f"{path} has {rows} tokens, the checkpoint {padded}: give the config.json of this "
            "model with --hf-config"
        )
    trained = getattr(args, "mdm_vocab_size", None)
    if trained is None:  # an older checkpoint, which lacks the number
        trained = max(tokens.values()) + 1 if tokens else getattr(args, "vocab_size", None)
    if trained is None and rows < padded:
        raise UserError(
            f"{path} has {rows} tokens and the checkpoint {padded} rows. The run's tokenizer tells "
            f"which of them are padding, and is not at {args.tokenizer_model}: put it there, or "
            "start in the directory that the training was started in"
        )
    if trained is not None and rows < trained:
        raise UserError(
            f"{path} has {rows} tokens and the run {trained}, of which the last {trained - rows} "
            "would be lost: give --hf-config the directory of a config.json with a vocab_size of "
            f"at least {trained}"
        )


def _compare_tokenizers(
    args: Namespace, tokens: Mapping[str, int], directory: Path, mask: int | None
) -> Iterator[str]:
    """Compares the run's tokenizer with the one that the conversion writes beside config.json.

    One of the two may lack the mask token, since config.json names its id.

    Args:
        args: arguments of the run.
        tokens: token -> id of the run's tokenizer, empty if it is not known.
        directory: directory of config.json.
        mask: id of the mask token.

    Yields:
        Lines that tell the user that nothing was compared, and why.

    Raises:
        UserError: a token has two ids; the message names the first such token.
    """
    written = tokens_of(directory)
    if not written:
        if tokens:
            yield f"no tokenizer is written: copy the run's, {args.tokenizer_model}, yourself"
        return
    if not tokens:
        reason = f"is not at {args.tokenizer_model}" if args.tokenizer_model else "names no tokens"
        yield f"the tokenizer of {directory} was not compared with the run's, which {reason}"
        return
    for token in {**tokens, **written}:
        ours, theirs = tokens.get(token), written.get(token)
        if ours != theirs and {ours, theirs} - {None} != {mask}:
            raise UserError(
                f"the tokens of {directory} are not those of the run ({args.tokenizer_model}): "
                f"{token!r} has id {theirs} there and {ours} in the run. Give --hf-config a "
                "directory with the run's tokenizer"
            )


def _mask_token(
    family: Family, config: Config, args: Namespace, rows: int, directory: Path
) -> int | None:
    """Returns the mask token of the run, for which config.json has to have a row.

    Raises:
        UserError: config.json has no row for it, or names another token.
    """
    declared = mask_token_id(family, config)
    trained: int | None = getattr(args, "mdm_mask_token_id", None)
    if trained is None:
        return declared
    path = directory / "config.json"
    if trained >= rows:
        raise UserError(
            f"the checkpoint's mask token {trained} lies outside the {rows} rows of {path}: give "
            "--hf-config the directory of a config.json that has it, such as the converted "
            f"checkpoint's {HUB_FILES}"
        )
    if declared is not None and declared != trained:
        raise UserError(
            f"the checkpoint was trained with mask token {trained}, {path} has {declared}: give "
            "its own config.json with --hf-config"
        )
    return trained


def _positions(family: Family, config: Config, args: Namespace) -> Config:
    """Returns the entry for config.json with the run's positions if the run has more of them."""
    name = "max_position_embeddings"
    positions = getattr(args, name)
    has_more = positions > family.value(config, name)
    return {family.sizes[name][0]: positions} if has_more else {}


def _shift(
    family: Family, config: Config, args: Namespace, mask: int | None, blocks: int | None
) -> Config:
    """Returns `mdm_shift` and `mdm_shift_first` for config.json, each unless it is right anyway."""
    if mask is None:
        return {}
    entries: dict[str, bool | str] = {}
    shift = bool(getattr(args, "mdm_shift", False))
    if family.mask_token_id is None or shift != shifted(family, config):
        entries["mdm_shift"] = shift
    first = getattr(args, "mdm_shift_first", "clean")
    if shift and blocks is not None and first != shift_first(family, config, shift, blocks):
        entries["mdm_shift_first"] = first
    return entries


def block_entry(family: Family, config: Config, blocks: int | None) -> Config:
    """Returns the entry for config.json that says the block size, nothing if it is right.

    Args:
        family: the model family.
        config: content of config.json.
        blocks: tokens in a block at the end of the run; None: whole rows.
    """
    key = family.block_size_key or "mdm_block_size"
    declared = config.get(key) or family.block_size
    if blocks == declared or (blocks is None and family.block_size_key is not None):
        return {}
    return {key: blocks}


def write_sglang_file(path: Path, blocks: int) -> None:
    """Writes the block size into SGLang's file; a file that is there keeps its other lines."""
    text = path.read_bytes() if path.exists() else b""
    entry = b"block_size: %d" % blocks
    text, found = re.subn(rb"(?m)^block_size[ \t]*:[ \t]*[^\s#]*", entry, text)
    if not found:
        text = entry + b"\n" + text
    path.write_bytes(text)


def _about_blocks(family: Family, blocks: int | None, output: str) -> Iterator[str]:
    key = family.block_size_key
    if blocks is not None:
        yield (
            f"trained in blocks of {blocks} tokens ({key or 'mdm_block_size'} in config.json); "
            "serving engines take the size from flags or files of their own"
        )
        if family.in_sglang:
            yield f"SGLang takes it from --dllm-algorithm-config {Path(output) / SGLANG_FILE}"
    elif key is not None:
        yield (
            f"trained in whole rows at last, which {family.architecture} has no setting for: "
            f"config.json goes on saying blocks ({key})"
        )


def _hub_directory(source: Path, args: Namespace, given: str | None) -> Path:
    if given is not None:
        return Path(given)
    tokenizer = tokenizer_of(str(source), args) if hasattr(args, "tokenizer_model") else None
    for candidate in (source / HUB_FILES, Path(tokenizer) if tokenizer else None):
        if candidate is not None and (candidate / "config.json").is_file():
            return candidate
    raise UserError(
        f"no config.json for {source}: give --hf-config DIR, the directory of the model that it "
        "was converted from, or of one of the same shape"
    )
