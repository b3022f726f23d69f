"""A launch with a narrower model, shorter rows and fewer micro-batches, for steps on a CPU."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import Dataset

POSITIONS = 64  # of a row
MOST_FACTOR = 64
STEPS = 2


def shrunk(args: Namespace) -> tuple[dict[str, Any], int]:
    """New values of arguments for the steps, and the factor by which the model is narrower.

    Layers, heads, groups, experts and vocabulary stay. The factor is a power of two that divides
    the hidden size and leaves each head an even number of channels. The width of feed-forward
    layers is rounded up to a multiple of the tensor-parallel size. The numbers are float32, because
    a CPU without bfloat16 arithmetic needs ten times as long for the head.

    Args:
        args: Megatron's validated arguments; not changed.
    """
    factor, channels = 1, args.kv_channels
    rotated = 1.0 if args.rotary_percent is None else args.rotary_percent
    while (
        factor < MOST_FACTOR
        and channels % (4 * factor) == 0
        and int(channels // (2 * factor) * rotated) % 2 == 0
        and args.hidden_size % (2 * factor) == 0
    ):
        factor *= 2
    parts = args.tensor_model_parallel_size * (args.expert_tensor_parallel_size or 1)

    def narrow(width: int) -> int:
        return int(-(-width // (factor * parts)) * parts)

    values: dict[str, Any] = {
        "hidden_size": args.hidden_size // factor,
        "kv_channels": channels // factor,
        "ffn_hidden_size": narrow(args.ffn_hidden_size),
        **{"bf16": False, "fp16": False, "params_dtype": torch.float32},
    }
    for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        if getattr(args, name):
            values[name] = narrow(getattr(args, name))
    unit = 2 * args.context_parallel_size * args.tensor_model_parallel_size
    length = min(args.seq_length, max(unit, POSITIONS // unit * unit))
    for name in ("seq_length", "encoder_seq_length", "decoder_seq_length"):
        if getattr(args, name):
            values[name] = length
    return values, factor


def fewer_micro_batches(args: Namespace, micro_batches: int) -> int:
    """Micro-batches of a step: enough to fill and to drain the pipeline, in whole groups.

    Args:
        args: Megatron's validated arguments.
        micro_batches: micro-batches of a step of the launch.
    """
    stages = args.pipeline_model_parallel_size
    group = 1
    if args.virtual_pipeline_model_parallel_size is not None:
        group = args.microbatch_group_size_per_vp_stage or stages
    return int(min(micro_batches, -(-max(2, 2 * stages - 1) // group) * group))


class CutRows(Dataset[dict[str, Any]]):
    """The rows of a `RowDataset`, each cut after its first positions.

    Args:
        rows: a `RowDataset` or `ValidationSets`.
        is_vector: columns of a row, see `row_columns`.
        length: positions that stay.
    """

    def __init__(self, rows: Any, is_vector: Mapping[str, bool], length: int) -> None:
        self.rows = rows
        self.split = rows.split
        self.length = length
        self._is_vector = is_vector

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.rows[index]
        for name, column in row.items():
            if self._is_vector[name]:
                row[name] = column[: self.length].clone()
            elif name in ("num_tokens", "length"):
                row[name] = column.clamp(max=self.length)
        return row
