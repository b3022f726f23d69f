"""Code that both directions of a conversion share: the pairing of tensors and their comparison."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_mdm.conversion import safetensors_model
from megatron_mdm.conversion.config import Config
from megatron_mdm.conversion.family import Family, mask_token_id
from megatron_mdm.conversion.layout import Heads, names_in_layer, part_shapes
from megatron_mdm.conversion.torch_dist import Place, locate
from megatron_mdm.conversion.vocabulary import TENSORS, Vocabulary
from megatron_mdm.errors import UserError, escaped

# Elements that are checked at a time. Small chunks keep the temporary tensors small.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Pair:
    """One Megatron tensor and the Hugging Face tensors that make it up.

    Attributes:
        target: name of the Megatron tensor in the family's table.
        places: places of the Megatron tensor in the checkpoint, one for each name that a layer
            specification (local, Transformer Engine) gives it.
        names: names of the Hugging Face tensors.
        shapes: shapes of the Hugging Face tensors.
    """

    target: str
    places: list[Place]
    names: list[str]
    shapes: list[tuple[int, ...]]

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def pair_tensors(
    family: Family,
    config: Config,
    shapes: dict[str, tuple[int, ...]],
    heads: Heads,
    rows: int,
    where: str,
) -> list[Pair]:
    """Pairs every Megatron tensor with its Hugging Face tensors.

    Args:
        family: the model family.
        config: content of config.json.
        shapes: key -> shape of the model's tensors in the checkpoint.
        heads: numbers of attention heads.
        rows: number of rows of the Hugging Face model's embedding.
        where: name of the checkpoint, for messages.

    Raises:
        UserError: the checkpoint lacks a tensor, or has one that the table does not list.
    """
    paired = []
    layers = family.expert_layers(config)
    tied = family.tied(config)
    for target, sources in family.tensors.items():
        if tied and target == "output_layer.weight":
            continue
        experts: Sequence[int | None] = [None]
        if "{e}" in sources[0]:
            experts = range(family.value(config, "num_experts"))
        for n, has_experts in enumerate(layers if "{n}" in target else [False]):
            keys = names_in_layer(target, has_experts)
            for e in experts if keys else []:
                places = [place for key in keys if (place := locate(key, n, shapes, e))]
                if not places:
                    raise UserError(f"{where} lacks the tensor {target.format(n=n)}")
                names = [source.format(n=n, e=e) for source in sources]
                parts = part_shapes(target, places[0].shape, len(names), heads)
                if target in TENSORS:
                    parts = [(rows, *places[0].shape[1:])]
                paired.append(Pair(target, places, names, parts))
    extra = sorted(set(shapes) - {place.key for pair in paired for place in pair.places})
    if extra:
        raise UserError(
            f"{where} has the tensor {extra[0]}, which the family {family.name} does not know"
        )
    return paired


def escaping(log: Callable[[str], object]) -> Callable[[str], object]:
    """Wraps a printing function: control characters in foreign names are printed as escapes."""
    return lambda line: log(escaped(line))


def check_space(directory: str, needed: int) -> None:
    """Checks that the disk of a directory has `needed` free bytes.

    Raises:
        UserError: it has fewer.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"{_size(needed)} are needed beside {Path(directory).parent} and {_size(free)} are "
            f"free, {_size(needed - free)} too little: give --output on another disk"
        )


def _size(num_bytes: float) -> str:
    """Formats a number of bytes with a suitable unit."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"


def write_hub_files(
    source: Path, target: Path, family: Family, config: Config, vocab: Vocabulary
) -> None:
    """Writes config.json for this vocabulary, and copies tokenizer, modeling code and model card.

    Raises:
        UserError: a file cannot be read.
    """
    target.mkdir(exist_ok=True)
    safetensors_model.copy_side_files(source, target)
    ours: dict[str, Any] = {
        "architectures": config.get("architectures") or [family.architecture],
        "model_type": config.get("model_type") or family.model_type,
    }
    if vocab.mask != mask_token_id(family, config):  # a family's own need not be in the file
        ours["mask_token_id"] = vocab.mask
    if vocab.size != vocab.source:
        ours |= {key: vocab.size for key in ("vocab_size", "embedding_size") if config.get(key)}
    text = json.dumps({**config, **ours}, indent=2, ensure_ascii=False)
    (target / "config.json").write_text(text + "\n", encoding="utf-8")


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Casts a tensor and checks that all its numbers are finite before and after.

    Args:
        tensor: floats of any shape.
        dtype: dtype of the result.
        name: name of the tensor, for the message.

    Raises:
        UserError: a number is not finite, or too large for the dtype.
    """
    value = _not_finite(tensor, tensor)
    if value is not None:
        raise UserError(
            f"the tensor {name} holds {value:g}: the training has diverged, or the file is "
            "damaged; convert an earlier checkpoint"
        )
    result = tensor.to(dtype)
    value = _not_finite(tensor, result)
    if value is not None:
        raise UserError(
            f"--dtype: {name} holds {value:.4g}, which is infinite in {dtype}: give --dtype "
            "bfloat16 or float32"
        )
    return result


def _not_finite(before: torch.Tensor, after: torch.Tensor) -> float | None:
    """Returns the first number of `before` that is not finite in `after`, None if there is none."""
    parts = (tensor.flatten().split(_CHUNK) for tensor in (before, after))
    for numbers, converted in zip(*parts, strict=True):
        lost = numbers[~converted.isfinite()]
        if len(lost):
            return float(lost[0])
    return None


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are bitwise equal; NaNs and signed zeros are compared by their bits."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(
            one.contiguous().view(-1).view(torch.uint8),
            other.contiguous().view(-1).view(torch.uint8),
        )
    )


def verify(
    tensor_pairs: Sequence[Pair],
    read: Callable[[Pair], Iterable[tuple[str, torch.Tensor, torch.Tensor]]],
    log: Callable[[str], object],
) -> None:
    """Checks that the written tensors are bitwise equal to the tensors that they were made from.

    Args:
        tensor_pairs: the tensors to compare.
        read: yields (name, written tensor, expected tensor) for a pair.
        log: prints a line for the user.

    Raises:
        UserError: a tensor differs; the message names the first one.
    """
    with progress(sum(pair.parameters for pair in tensor_pairs), "verifying", "") as advance:
        for pair in tensor_pairs:
            for name, one, other in read(pair):
                if not equal(one, other):
                    raise UserError(
                        f"--verify: {name} reads back differently from what was written: check "
                        "the disk, nothing was kept"
                    )
            advance(pair.parameters)
    log(f"verified: {sum(len(pair.names) for pair in tensor_pairs)} tensors are bitwise equal")


@contextmanager
def progress(total: int, text: str, unit: str = "B") -> Iterator[Callable[[int], object]]:
    """Shows a progress bar on a terminal, and nothing elsewhere."""
    with tqdm(total=total, desc=text, unit=unit, unit_scale=True, disable=None, leave=False) as bar:
        yield bar.update
