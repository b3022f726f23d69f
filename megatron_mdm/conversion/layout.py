"""Fuses Hugging Face tensors into Megatron's tensors and splits them again.

`linear_qkv` holds, per query group, its queries, then its key, then its value (Megatron's
SelfAttention.get_query_key_value_tensors). `linear_fc1` holds the gate projection and then the up
projection (Megatron's gated MLP activates the first half). All other tensors are the same on both
sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]

# Megatron's tensors that only one kind of layer has.
_OF_EXPERTS = (".mlp.router.", ".mlp.experts.")
_OF_DENSE = (".mlp.linear_fc1.weight", ".mlp.linear_fc2.weight")
# The same norm has two names in a layer with experts: in the local layer specification, and in
# Transformer Engine's.
LOCAL_NORM = "mlp.linear_fc1.layer_norm_weight"
TE_NORM = "pre_mlp_layernorm.weight"


def names_in_layer(target: str, experts: bool) -> list[str]:
    """Returns Megatron's names of a tensor in one layer.

    There is no name if this kind of layer lacks the tensor, and there are two if the local layer
    specification and Transformer Engine's differ.

    Args:
        target: name of the tensor in a family's table.
        experts: whether the layer has experts; False for a dense layer.
    """
    if any(part in target for part in _OF_EXPERTS):
        return [target] if experts else []
    if experts and target.endswith(_OF_DENSE):
        return []
    if experts and target.endswith(LOCAL_NORM):
        return [target, target.removesuffix(LOCAL_NORM) + TE_NORM]
    return [target]


@dataclass(frozen=True)
class Heads:
    """Numbers of attention heads: `queries` query heads share `groups` key-value heads."""

    queries: int
    groups: int


def part_shapes(target: str, shape: Shape, parts: int, heads: Heads) -> list[Shape]:
    """Returns the shapes of the Hugging Face tensors that make up a Megatron tensor.

    Args:
        target: name of the Megatron tensor, which determines how the parts are arranged.
        shape: shape of the Megatron tensor; rows are output features.
        parts: number of the Hugging Face tensors.
        heads: numbers of attention heads.
    """
    rows, rest = shape[0], tuple(shape[1:])
    if ".linear_qkv." in target and parts == 3:
        per_head = rows // (heads.queries + 2 * heads.groups)
        counts = [heads.queries * per_head, heads.groups * per_head, heads.groups * per_head]
    else:
        counts = [rows // parts] * parts
    return [(count, *rest) for count in counts]


def join(target: str, parts: Sequence[torch.Tensor], heads: Heads) -> torch.Tensor:
    """Builds a Megatron tensor from its Hugging Face tensors, all [output features, ...]."""
    if len(parts) == 1:
        return parts[0]
    if ".linear_qkv." in target:
        grouped = [part.unflatten(0, (heads.groups, -1)) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)
    return torch.cat(list(parts))


def split(target: str, tensor: torch.Tensor, parts: int, heads: Heads) -> list[torch.Tensor]:
    """Splits a Megatron tensor into its Hugging Face tensors: the inverse of `join`."""
    if parts == 1:
        return [tensor]
    if ".linear_qkv." in target:
        share = heads.queries // heads.groups
        per_head = tensor.shape[0] // (heads.queries + 2 * heads.groups)
        grouped = tensor.unflatten(0, (heads.groups, -1))
        sizes = [share * per_head, per_head, per_head]
        return [part.flatten(0, 1).contiguous() for part in grouped.split(sizes, dim=1)]
    return list(tensor.chunk(parts))
