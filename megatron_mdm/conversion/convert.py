"""The conversions: every tensor is read, arranged and written on its own, and none is left over."""

import json
import shlex
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_mdm.conversion import contract as megatron
from megatron_mdm.conversion import hub, torch_dist
from megatron_mdm.conversion.families import Family, detect, mask_token_id, model_flags
from megatron_mdm.conversion.layout import Heads, join, part_shapes, split
from megatron_mdm.conversion.torch_dist import DistCheckpoint, Piece, Place, locate
from megatron_mdm.conversion.vocabulary import (
    MASK_TOKEN,
    TENSORS,
    Vocabulary,
    add_mask_token,
    embedding_rows,
    tokenizer_size,
    vocabulary,
)
from megatron_mdm.data.outputs import new_directory
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.architecture import differences

# Where a converted checkpoint keeps config.json and the tokenizer.
HUB_FILES = "huggingface"
LAUNCH_FILE = "launch.txt"
# Tensors that some releases carry along, computed from the configuration.
COMPUTED = (".rotary_emb.inv_freq",)
_PRECISION = {torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"]}


@dataclass(frozen=True)
class Pair:
    """One Megatron tensor and the Hugging Face tensors that make it up.

    Attributes:
        target: the table's name of the Megatron tensor.
        place: where it lies in the checkpoint.
        names: the Hugging Face tensors.
        shapes: theirs.
    """

    target: str
    place: Place
    names: list[str]
    shapes: list[tuple[int, ...]]


def pairs(
    family: Family,
    shapes: dict[str, tuple[int, ...]],
    layers: int,
    tied: bool,
    heads: Heads,
    rows: int,
    where: str,
) -> list[Pair]:
    """Pairs every Megatron tensor with its sources.

    Args:
        family: the table.
        shapes: key -> shape of the model's tensors in the checkpoint.
        layers: number of layers.
        tied: the output layer is the embedding.
        heads: of the attention.
        rows: of the Hugging Face model's embedding.
        where: the checkpoint, for messages.

    Raises:
        UserError: a tensor is missing, or not in the table.
    """
    found = []
    for target, sources in family.tensors.items():
        if tied and target == "output_layer.weight":
            continue
        for n in range(layers if "{n}" in target else 1):
            place = locate(target, n, shapes)
            if place is None:
                raise UserError(f"{where} lacks the tensor {target.format(n=n)}")
            names = [source.format(n=n) for source in sources]
            parts = part_shapes(target, place.shape, len(names), heads)
            if target in TENSORS:
                parts = [(rows, *place.shape[1:])]
            found.append(Pair(target, place, names, parts))
    extra = sorted(set(shapes) - {pair.place.key for pair in found})
    if extra:
        raise UserError(
            f"{where} has the tensor {extra[0]}, which the family {family.name} does not know"
        )
    return found


def to_megatron(
    source: str,
    output: str,
    *,
    add_mask: bool = False,
    multiple: int = 1,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    say: Callable[[str], object] = print,
) -> None:
    """Hugging Face safetensors -> Megatron torch_dist.

    Args:
        source: model directory.
        output: checkpoint directory to be made.
        add_mask: give an autoregressive model a mask token.
        multiple: Megatron's vocabulary is padded to a multiple of it.
        dtype: dtype to write; None for the source's.
        verify: read everything again and compare.
        say: prints a line for the user.

    Raises:
        UserError: the model cannot be converted exactly, or the output not written.
    """
    with new_directory(output) as temporary:
        directory = Path(source)
        config = hub.read_config(directory)
        family = detect(config)
        model = hub.HubModel(directory)
        words = vocabulary(config, directory, mask_token_id(family, config), add_mask, multiple)
        kind = dtype or _common_dtype(model)
        # What was trained autoregressively goes on predicting the token after each position.
        shifted = family.shifted or words.added
        flags = [
            *model_flags(family, config),
            *["--padded-vocab-size", str(words.padded)],
            *(["--mdm-mask-token-id", str(words.mask)] if words.mask is not None else []),
            *_PRECISION.get(kind, []),
            *_tokenizer_flags(directory, Path(output), words, config),
        ]
        agreed = megatron.contract(flags)
        args = megatron.arguments(flags)
        args.mdm_shift = shifted
        heads = Heads(args.num_attention_heads, args.num_query_groups)
        tied = family.tied(config)
        found = pairs(
            family, agreed.shapes, args.num_layers, tied, heads, words.source, "the table"
        )
        _check_sources(model, found, directory, family, tied)
        _check_space(temporary, sum(entry.size for entry in model.entries.values()))

        def make(pair: Pair) -> torch.Tensor:
            tensor = join(pair.target, [model.read(name) for name in pair.names], heads)
            return (words.widen(tensor) if pair.target in TENSORS else tensor).to(kind)

        pieces = [
            Piece(pair.place, agreed.shapes[pair.place.key], kind, partial(make, pair))
            for pair in found
        ]
        total = sum(torch.Size(p.place.shape).numel() for p in pieces) * kind.itemsize
        with _progress(total, "converting") as advance:
            torch_dist.write(Path(temporary), pieces, agreed.objects, args, advance)
        _write_hub_files(directory, Path(temporary) / HUB_FILES, family, config, words)
        if shifted:
            flags.append("--mdm-shift")
        launch = _launch_line(output, flags)
        (Path(temporary) / LAUNCH_FILE).write_text(launch + "\n")
        if verify:
            _verify_megatron(DistCheckpoint(Path(temporary)), model, found, heads, words, kind, say)
    for line in _remarks(family, words, tied):
        say(line)
    say(f"{output}: {family.name}, {sum(_count(pair) for pair in found):,} parameters, {kind}")
    say(f"train it with (data, batch and schedule are yours):\n\n{launch}\n")


def to_hugging_face(
    source: str,
    output: str,
    *,
    config_from: str | None = None,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    say: Callable[[str], object] = print,
) -> None:
    """Megatron torch_dist, written under any layout -> Hugging Face safetensors.

    Args:
        source: checkpoint directory.
        output: model directory to be made.
        config_from: directory with config.json and tokenizer; None for the one that the converted
            checkpoint, or the run's tokenizer, has.
        iteration: which checkpoint; None for the last.
        dtype: dtype to write; None for the checkpoint's.
        verify: read everything again and compare.
        say: prints a line for the user.

    Raises:
        UserError: the checkpoint is not the model that config.json describes, or is damaged.
    """
    with new_directory(output) as temporary:
        checkpoint = DistCheckpoint(Path(source), iteration)
        args = checkpoint.args
        directory = _hub_directory(Path(source), args, config_from)
        config = hub.read_config(directory)
        family = detect(config)
        _check_same_model(family, config, args, directory, source)
        heads = Heads(args.num_attention_heads, args.num_query_groups)
        rows = embedding_rows(config)
        found = pairs(
            family,
            checkpoint.shapes,
            args.num_layers,
            family.tied(config),
            heads,
            rows,
            str(checkpoint.path),
        )
        padded = checkpoint.shapes[TENSORS[0]][0]
        if padded < rows:
            raise UserError(
                f"{directory / 'config.json'} has {rows} tokens, the checkpoint {padded}: give the "
                "config.json of this model with --hf-config"
            )

        def make(pair: Pair) -> list[torch.Tensor]:
            tensor = checkpoint.read(pair.place)
            if pair.target in TENSORS:
                tensor = tensor[:rows]
            parts = split(pair.target, tensor, len(pair.names), heads)
            return [part.to(dtype or part.dtype) for part in parts]

        outputs = [
            hub.Output(
                pair.names,
                pair.shapes,
                dtype or checkpoint.dtype(pair.place.key),
                partial(make, pair),
            )
            for pair in found
        ]
        total = sum(item.bytes for item in outputs)
        _check_space(temporary, total)
        with _progress(total, "converting") as advance:
            for size in hub.write_model(Path(temporary), outputs):
                advance(size)
        kinds = {item.dtype for item in outputs}
        words = Vocabulary(rows, rows, padded, mask_token_id(family, config))
        written = config | {
            next(k for k in ("torch_dtype", "dtype") if k in config or k == "dtype"): str(
                max(kinds, key=lambda kind: kind.itemsize)
            ).removeprefix("torch.")
        }
        _write_hub_files(directory, Path(temporary), family, written, words)
        if verify:
            _verify_hub(hub.HubModel(Path(temporary)), found, make, say)
    if padded > rows:
        say(f"left out {padded - rows} padding rows of the vocabulary")
    say(f"{output}: {family.name} ({family.architecture}), {sum(map(_count, found)):,} parameters")


def _check_sources(
    model: hub.HubModel, found: Sequence[Pair], directory: Path, family: Family, tied: bool
) -> None:
    """Every tensor is there, in the right shape, and none is left over."""
    used: set[str] = set()
    for pair in found:
        for name, shape in zip(pair.names, pair.shapes, strict=True):
            entry = model.entries.get(name)
            if entry is None:
                raise UserError(
                    f"{directory} lacks the tensor {name}, which the family {family.name} needs"
                )
            if entry.shape != shape:
                raise UserError(
                    f"{entry.path}: {name} has shape {list(entry.shape)}, config.json implies "
                    f"{list(shape)}"
                )
        used.update(pair.names)
    if tied:
        used |= _check_tied(model, family)
    unused = sorted(n for n in set(model.entries) - used if not n.endswith(COMPUTED))
    if unused:
        raise UserError(
            f"{directory} has the tensor {unused[0]}, which the family {family.name} has no place "
            f"for ({len(unused)} in all): the converted model would not be the same"
        )


def _check_tied(model: hub.HubModel, family: Family) -> set[str]:
    """A tied model may be saved with its output layer, if that is the embedding."""
    (embedding,), (output,) = (family.tensors[name] for name in TENSORS)
    if output not in model.entries:
        return set()
    if not _equal(model.read(embedding), model.read(output)):
        raise UserError(
            f"config.json ties the embeddings, but {output} differs from {embedding}: set "
            f"{family.tied_key} to false"
        )
    return {output}


def _common_dtype(model: hub.HubModel) -> torch.dtype:
    kinds: dict[torch.dtype, str] = {}
    for name, entry in model.entries.items():
        if not name.endswith(COMPUTED):
            kinds.setdefault(entry.dtype, name)
    if len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        raise UserError(
            f"the tensors differ in dtype ({first}: {one}, {second}: {other}): choose one with "
            "--dtype"
        )
    return next(iter(kinds))


def _check_space(directory: str, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"{needed / 1e9:.1f} GB are needed beside {Path(directory).parent}, {free / 1e9:.1f} "
            "GB are free: give --output on another disk"
        )


def _check_same_model(
    family: Family, config: dict[str, Any], args: Namespace, directory: Path, source: str
) -> None:
    """The checkpoint's arguments build the model that config.json describes."""
    expected = megatron.arguments(
        [*model_flags(family, config), "--padded-vocab-size", str(args.padded_vocab_size)]
    )
    # Which token a position predicts is the run's own choice, and not in the weights' shapes.
    described = {name: value for name, value in vars(expected).items() if name != "mdm_shift"}
    wrong = differences(vars(args), described, "config.json")
    if wrong:
        raise UserError(
            f"the checkpoint in {source} is not the model of {directory / 'config.json'}: {wrong}. "
            "Give its config.json with --hf-config"
        )


def _hub_directory(source: Path, args: Namespace, given: str | None) -> Path:
    if given is not None:
        return Path(given)
    candidates = [source / HUB_FILES]
    if getattr(args, "tokenizer_model", None):
        candidates.append(Path(args.tokenizer_model))
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(
        f"no config.json for {source}: give --hf-config DIR, the directory of the model that it "
        "was converted from, or of one of the same shape"
    )


def _tokenizer_flags(
    directory: Path, output: Path, words: Vocabulary, config: dict[str, Any]
) -> list[str]:
    if tokenizer_size(directory) is None:
        flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(words.size)]
        end = config.get("eos_token_id")
        return [*flags, *(["--null-tokenizer-eod-id", str(end)] if isinstance(end, int) else [])]
    flags = ["--tokenizer-type", "HuggingFaceTokenizer"]
    flags += ["--tokenizer-model", str(output.absolute() / HUB_FILES)]
    settings = directory / "tokenizer_config.json"
    if settings.exists() and "auto_map" in json.loads(settings.read_text(encoding="utf-8")):
        flags.append("--trust-remote-code")
    return flags


def _write_hub_files(
    source: Path, target: Path, family: Family, config: dict[str, Any], words: Vocabulary
) -> None:
    """config.json for this vocabulary, and the tokenizer, model code and card as they are."""
    target.mkdir(exist_ok=True)
    for path in hub.side_files(source):
        shutil.copyfile(path, target / path.name)
    sizes = {key: words.size for key in ("vocab_size", "embedding_size") if config.get(key)}
    if words.added:
        sizes["mask_token_id"] = words.mask
        add_mask_token(target, words.mask)
    if not words.added and words.size == words.source:
        sizes = {}
    names = {
        "architectures": config.get("architectures") or [family.architecture],
        "model_type": config.get("model_type") or family.model_type,
    }
    text = json.dumps(config | names | sizes, indent=2, ensure_ascii=False)
    (target / "config.json").write_text(text + "\n", encoding="utf-8")


def _launch_line(output: str, flags: Sequence[str]) -> str:
    """The command that trains the converted model, a few flags to a line."""
    words = [
        *["--load", str(Path(output).absolute()), "--finetune", "--save", "MY_RUN"],
        *flags,
        *["--data-path", "MY_DATA", "--micro-batch-size", "1", "--global-batch-size", "64"],
        *["--train-iters", "10000", "--lr", "1e-5", "--lr-warmup-iters", "100"],
    ]
    lines, line = [], "torchrun --nproc-per-node 8 -m megatron_mdm.pretrain"
    for i, word in enumerate(words):
        value = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else ""
        if word.startswith("--") and len(f"{line} {word} {value}") > 96:
            lines.append(line)
            line = "   "
        line += " " + shlex.quote(word)
    return " \\\n".join([*lines, line])


def _remarks(family: Family, words: Vocabulary, tied: bool) -> Iterator[str]:
    if words.added:
        yield (
            f"added the mask token {MASK_TOKEN} with id {words.mask}"
            + (
                f", which enlarges the vocabulary to {words.size}"
                if words.size > words.source
                else ", an unused row of the vocabulary"
            )
            + "; its rows in the embedding"
            + (" (which is the output layer)" if tied else " and the output layer")
            + " are the mean of those before it"
        )
    if words.mask is None:
        yield (
            "this is an autoregressive model without a mask token: to train it as a diffusion "
            "model, convert it with --add-mask-token"
        )
    if words.padded > words.size:
        yield (
            f"padded the vocabulary from {words.size} to {words.padded} rows: the padding is zeros "
            "and takes part in the softmax"
        )
    if family.shifted or words.added:
        yield "the logits of position i - 1 predict token i: --mdm-shift"


def _verify_megatron(
    checkpoint: DistCheckpoint,
    model: hub.HubModel,
    found: Sequence[Pair],
    heads: Heads,
    words: Vocabulary,
    kind: torch.dtype,
    say: Callable[[str], object],
) -> None:
    """Takes what was written apart again, and compares it bitwise with the source's tensors."""
    with _progress(sum(map(_count, found)), "verifying", "") as advance:
        for pair in found:
            tensor = checkpoint.read(pair.place)
            if pair.target in TENSORS:
                if not _equal(tensor, words.widen(model.read(pair.names[0])).to(kind)):
                    raise _unequal(pair.names[0])
            else:
                parts = split(pair.target, tensor, len(pair.names), heads)
                for name, part in zip(pair.names, parts, strict=True):
                    if not _equal(part, model.read(name).to(kind)):
                        raise _unequal(name)
            advance(_count(pair))
    say(f"verified: {sum(len(pair.names) for pair in found)} tensors are bitwise equal")


def _verify_hub(
    model: hub.HubModel,
    found: Sequence[Pair],
    make: Callable[[Pair], list[torch.Tensor]],
    say: Callable[[str], object],
) -> None:
    """Reads what was written, and compares it bitwise with the checkpoint's tensors."""
    with _progress(sum(map(_count, found)), "verifying", "") as advance:
        for pair in found:
            for name, part in zip(pair.names, make(pair), strict=True):
                if not _equal(part, model.read(name)):
                    raise _unequal(name)
            advance(_count(pair))
    say(f"verified: {sum(len(pair.names) for pair in found)} tensors are bitwise equal")


def _unequal(name: str) -> UserError:
    return UserError(
        f"--verify: {name} reads back differently from what was written: check the disk, nothing "
        "was kept"
    )


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bitwise equality, of NaNs and of signed zeros too."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(
            one.contiguous().view(-1).view(torch.uint8),
            other.contiguous().view(-1).view(torch.uint8),
        )
    )


def _count(pair: Pair) -> int:
    return sum(torch.Size(shape).numel() for shape in pair.shapes)


@contextmanager
def _progress(total: int, text: str, unit: str = "B") -> Iterator[Callable[[int], object]]:
    """A bar on a terminal, nothing elsewhere."""
    with tqdm(total=total, desc=text, unit=unit, unit_scale=True, disable=None, leave=False) as bar:
        yield bar.update
