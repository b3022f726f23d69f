"""Context parallelism on the CPU: attention that gathers keys and values from all ranks."""

import contextlib
from collections.abc import Iterator

import torch
from megatron.core import mpu

from megatron_mdm.mcore.device import replaced
from megatron_mdm.mcore.model.context_parallel import own_positions
from tests.ranks.recording import train


def context_parallel() -> None:
    """Runs the program under context parallelism, with the attention of `gathered_attention`."""
    with gathered_attention():
        train()


@contextlib.contextmanager
def gathered_attention() -> Iterator[None]:
    """Context in which new models have an attention that gathers all keys and values of a row.

    It stands in for Transformer Engine's ring attention, which needs a GPU.
    """
    from megatron_mdm.mcore.flags import arguments
    from megatron_mdm.mcore.model import builder

    def gathering(make_spec, layers_of):
        def make(*args, **kwargs):
            spec = make_spec(*args, **kwargs)
            for layer in layers_of(spec):
                layer.submodules.self_attention.submodules.core_attention = GatheringAttention
            return spec

        return make

    specs = {
        "bidirectional_spec": lambda spec: spec.layer_specs,
        "bidirectional_stack": lambda spec: [spec.submodules.attention_layer],
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(arguments, "_check_context_parallel", lambda *_: None))
        for name, layers_of in specs.items():
            made = gathering(getattr(builder, name), layers_of)
            stack.enter_context(replaced(builder, name, made))
        yield


class GatheringAttention(torch.nn.Module):
    """Attention without a causal mask. q, k, v have shape [s / ranks, b, heads or groups, h].

    A mask has the rows of the rank's own positions, and the columns of all positions in their
    order, as Transformer Engine's ring attention takes it.
    """

    def __init__(self, *_, **__):
        super().__init__()

    def forward(self, q, k, v, attention_mask, *_, **__):
        k, v = (
            _Gathered.apply(x).repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v)
        )
        scores = torch.einsum("qbnh,kbnh->bnqk", q, k) / q.shape[-1] ** 0.5
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask, -10000.0)
        return torch.einsum("bnqk,kbnh->qbnh", scores.softmax(dim=-1), v).flatten(2)


class _Gathered(torch.autograd.Function):
    """The positions [s / ranks, ...] of the context-parallel ranks in the order of the row [s]."""

    @staticmethod
    def forward(ctx, part):
        group = mpu.get_context_parallel_group()
        length = len(part) * group.size()
        ctx.positions = own_positions(length, part.device)
        whole = part.new_zeros(length, *part.shape[1:]).index_copy(0, ctx.positions, part)
        torch.distributed.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient, group=mpu.get_context_parallel_group())
        return gradient[ctx.positions]
