"""The pipeline of a step: micro-batches in flight on a stage, and the share of time that it idles.

Megatron's schedules are 1F1B and, with virtual stages, interleaved 1F1B (arXiv 2104.04473, section
2.2).
"""

from argparse import Namespace


def micro_batches_in_flight(args: Namespace, stage: int, micro_batches: int) -> float:
    """The largest number of micro-batches whose activations a stage holds, in whole stages.

    Args:
        args: Megatron's validated arguments.
        stage: number of the pipeline stage, from 0.
        micro_batches: micro-batches of a step.

    Returns:
        With V virtual stages, a micro-batch in one of them counts 1 / V.
    """
    stages = args.pipeline_model_parallel_size
    virtual = args.virtual_pipeline_model_parallel_size
    if virtual is None:
        return float(min(micro_batches, stages - stage))
    group = args.microbatch_group_size_per_vp_stage or stages
    forward_first = 2 * (stages - stage - 1) + (virtual - 1) * group + 1
    return float(min(micro_batches * virtual, forward_first) / virtual)


def bubble(args: Namespace, micro_batches: int) -> float:
    """Time that a stage waits in a step, divided by the time that it computes.

    Args:
        args: Megatron's validated arguments.
        micro_batches: micro-batches of a step.
    """
    virtual = args.virtual_pipeline_model_parallel_size or 1
    return float((args.pipeline_model_parallel_size - 1) / (virtual * micro_batches))
