"""Context parallelism: ranks of a group have the same rows, and each rank a part of the positions.

Every rank draws rates and masks for whole rows and then shards them as Megatron shards tokens, so
they are the same as in any other layout. Values of whole rows, such as the loss and the norm of the
gradient, are summed over the group. Sequence parallelism cuts a rank's positions once more.
"""

import torch
from megatron.core import mpu
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank


def shard_sequence(whole: torch.Tensor) -> torch.Tensor:
    """This rank's positions of whole rows: [b, s] to [b, s / ranks], in Megatron's zig-zag order.

    Bidirectional attention does not depend on the order. Megatron shards the rotary embedding in
    the same zig-zag order.
    """
    if mpu.get_context_parallel_world_size() == 1:
        return whole
    batch = {"whole": whole.contiguous()}
    group = mpu.get_context_parallel_group()
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)["whole"]


def sequence_parallel_part(config: TransformerConfig) -> tuple[int, int]:
    """(number of parts that sequence parallelism cuts positions into, the part of this rank)."""
    if not config.sequence_parallel:
        return 1, 0
    return mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()


def own_positions(length: int, device: torch.device) -> torch.Tensor:
    """The positions that this rank has of rows of `length` positions, int64 [length / ranks]."""
    return shard_sequence(torch.arange(length, device=device)[None])[0]


def unshard_sequence(part: torch.Tensor) -> torch.Tensor:
    """Inverse of `shard_sequence`: [b, s / ranks] to [b, s], 0 at the other ranks' positions."""
    ranks = mpu.get_context_parallel_world_size()
    if ranks == 1:
        return part
    b, s = part.shape[0], part.shape[1] * ranks
    return part.new_zeros(b, s).index_copy(1, own_positions(s, part.device), part)


def sum_over_cp_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sums values that the ranks of the group computed on their parts of rows; no gradient."""
    values = values.detach().clone()
    if mpu.get_context_parallel_world_size() > 1:
        torch.distributed.all_reduce(values, group=mpu.get_context_parallel_group())
    return values


def is_first_cp_rank() -> bool:
    """Whether this rank is the first of its group. Only that rank counts values of whole rows."""
    return mpu.get_context_parallel_rank() == 0
