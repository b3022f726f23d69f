"""Context parallelism on the CPU: attention that gathers keys and values from all ranks."""

import torch
from megatron.core import mpu

from tests.ranks.recording import train


def context_parallel() -> None:
    """Runs the program under context parallelism, with the attention of `gather_for_attention`."""
    gather_for_attention()
    train()


def gather_for_attention() -> None:
    """Replaces attention by an attention that gathers all keys and values of a row.

    It stands in for Transformer Engine's ring attention, which needs a GPU.
    """
    from megatron_mdm.mcore.flags import arguments
    from megatron_mdm.mcore.model import builder

    class GatheringAttention(torch.nn.Module):
        """Full attention. q, k, v have shape [s / ranks, b, heads or groups, h]."""

        def __init__(self, *_, **__):
            super().__init__()

        def forward(self, q, k, v, *_, **__):
            k, v = (
                _Gathered.apply(x).repeat_interleave(q.shape[2] // x.shape[2], dim=2)
                for x in (k, v)
            )
            scores = torch.einsum("qbnh,kbnh->bnqk", q, k) / q.shape[-1] ** 0.5
            return torch.einsum("bnqk,kbnh->qbnh", scores.softmax(dim=-1), v).flatten(2)

    def gathering(make_spec):
        def make(*args, **kwargs):
            spec = make_spec(*args, **kwargs)
            for layer in spec.layer_specs:
                layer.submodules.self_attention.submodules.core_attention = GatheringAttention
            return spec

        return make

    arguments._check_context_parallel = lambda *_: None
    builder.bidirectional_spec = gathering(builder.bidirectional_spec)


class _Gathered(torch.autograd.Function):
    """Concatenates the parts of the context-parallel ranks along the first dimension."""

    @staticmethod
    def forward(ctx, part):
        group = mpu.get_context_parallel_group()
        parts = [torch.empty_like(part) for _ in range(group.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        group = mpu.get_context_parallel_group()
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient, group=group)
        return gradient.chunk(group.size())[group.rank()]
