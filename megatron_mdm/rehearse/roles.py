"""The ranks of a launch that differ from each other."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mdm.sizing.nodes import Layout


@dataclass(frozen=True)
class Role:
    """A rank of a launch; its tensor-parallel rank is 0, which is the one that reads the rows.

    Attributes:
        world: number of ranks of the launch.
        gpus: ranks of a node.
        rank: global rank.
        stage, data, context: pipeline stage, data-parallel rank, context-parallel rank.
        name: the role in words.
    """

    world: int
    gpus: int
    rank: int
    stage: int
    data: int
    context: int
    name: str


def roles(layout: Layout, nodes: int, gpus: int, flags: Sequence[str]) -> list[Role]:
    """The first, a middle and the last pipeline stage, of the first and of the last replica.

    The first role is rank 0, which also builds the index of the data. If a flag gives stages
    different layers one by one, every stage has a role.

    Args:
        layout: how the run is divided among its ranks, which `nodes` nodes fit.
        nodes: number of nodes.
        gpus: number of GPUs of a node.
        flags: the flags of the launch.
    """
    world = nodes * gpus
    replicas = world // layout.replica
    last = layout.pipeline_model_parallel_size - 1
    middle = {last // 2} if last > 1 else set()
    if "--pipeline-model-parallel-layout" in flags:
        middle = {*range(1, last)}
    is_pp_first = "--use-tp-pp-dp-mapping" in flags
    ends = [(0, 0), (replicas - 1, layout.context_parallel_size - 1)]
    places = [(stage, *end) for stage in sorted({0, last}) for end in dict.fromkeys(ends)]
    places += [(stage, 0, 0) for stage in sorted(middle)]
    found = []
    for stage, data, context in places:
        # Megatron's order: tensor, context, data, pipeline; or tensor, context, pipeline, data.
        outer = stage * replicas + data
        if is_pp_first:
            outer = data * (last + 1) + stage
        inner = context + layout.context_parallel_size * outer
        words = []
        if last:
            words.append(f"stage {stage} of {last + 1}")
        if replicas > 1:
            words.append(f"data-parallel rank {data} of {replicas}")
        if layout.context_parallel_size > 1:
            words.append(f"context-parallel rank {context} of {layout.context_parallel_size}")
        rank = layout.tensor_model_parallel_size * inner
        name = ", ".join([f"rank {rank} of {world}", *words])
        found.append(Role(world, gpus, rank, stage, data, context, name))
    return found
