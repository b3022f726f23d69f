"""Fuses Hugging Face tensors into Megatron's tensors and splits them again.

`linear_qkv` holds, per query group, its queries, then its key, then its value (Megatron's
SelfAttention.get_query_key_value_tensors). `linear_fc1` holds the gate projection and then the up
projection (Megatron's gated MLP activates the first half). A fused tensor of Hugging Face
(query_key_value) holds all queries, then all keys, then all values. All other tensors are the same
on both sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]

# Megatron's tensors that only one kind of layer has.
_OF_EXPERTS = (".mlp.router.", ".mlp.experts.", ".mlp.shared_experts.")
_OF_DENSE = (".mlp.linear_fc1.weight", ".mlp.linear_fc2.weight")
# The same norm has two names in a layer with experts: in the local layer specification, and in
# Transformer Engine's.
LOCAL_NORM = "mlp.linear_fc1.layer_norm_weight"
TE_NORM = "pre_mlp_layernorm.weight"
# The bias of the experts keeps its dtype, whatever the precision of the weights: Megatron and
# serving engines hold it in float32, since rounding it changes which experts are chosen.
_OWN_DTYPE = ".mlp.router.expert_bias"


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


def keeps_its_dtype(target: str) -> bool:
    """Whether a tensor has a dtype of its own, which the dtype of the weights does not change."""
    return target.endswith(_OWN_DTYPE)


@dataclass(frozen=True)
class Heads:
    """Numbers of attention heads: `queries` query heads share `groups` key-value heads."""

    queries: int
    groups: int

    def rows(self, total: int) -> list[int]:
        """Returns the rows of all queries, of all keys and of all values among `total` rows."""
        per_head = total // (self.queries + 2 * self.groups)
        return [self.queries * per_head, self.groups * per_head, self.groups * per_head]


def part_shapes(target: str, shape: Shape, parts: int, heads: Heads) -> list[Shape]:
    """Returns the shapes of the Hugging Face tensors that make up a Megatron tensor.

    Args:
        target: name of the Megatron tensor, which determines how the parts are arranged.
        shape: shape of the Megatron tensor; rows are output features.
        parts: number of the Hugging Face tensors.
        heads: numbers of attention heads.
    """
    rows, rest = shape[0], tuple(shape[1:])
    counts = heads.rows(rows) if _is_qkv(target) and parts == 3 else [rows // parts] * parts
    return [(count, *rest) for count in counts]


def join(target: str, parts: Sequence[torch.Tensor], heads: Heads) -> torch.Tensor:
    """Builds a Megatron tensor from its Hugging Face tensors, all [output features, ...]."""
    if _is_qkv(target):
        if len(parts) == 1:
            parts = parts[0].split(heads.rows(len(parts[0])))
        grouped = [part.unflatten(0, (heads.groups, -1)) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def split(target: str, tensor: torch.Tensor, parts: int, heads: Heads) -> list[torch.Tensor]:
    """Splits a Megatron tensor into its Hugging Face tensors: the inverse of `join`."""
    if _is_qkv(target):
        grouped = tensor.unflatten(0, (heads.groups, -1))
        sizes = [rows // heads.groups for rows in heads.rows(len(tensor))]
        separate = [part.flatten(0, 1).contiguous() for part in grouped.split(sizes, dim=1)]
        return [torch.cat(separate)] if parts == 1 else separate
    return [tensor] if parts == 1 else list(tensor.chunk(parts))


def _is_qkv(target: str) -> bool:
    return target.endswith((".linear_qkv.weight", ".linear_qkv.bias"))
