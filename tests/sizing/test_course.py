"""The numbers of a run: pipeline, hours, checkpoints, memory."""

from argparse import Namespace

import pytest

from megatron_mdm.sizing.course import Course, checkpoints_that_stay
from megatron_mdm.sizing.memory import Stage, bytes_of_stage
from megatron_mdm.sizing.pipeline import bubble, micro_batches_in_flight


def layout(stages, virtual=None, group=None):
    return Namespace(
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=virtual,
        microbatch_group_size_per_vp_stage=group,
    )


def in_flight_when_simulated(stages, stage, virtual, micro_batches):
    """Most chunks in flight under Megatron's warm-up rule, one forward and one backward in turn."""
    total = micro_batches * virtual
    warmup = (stages - stage - 1) * (2 if virtual > 1 else 1) + (virtual - 1) * stages
    open_chunks = most = min(warmup, total)
    for _ in range(total - open_chunks):
        open_chunks += 1
        most = max(most, open_chunks)
        open_chunks -= 1
    return most / virtual


@pytest.mark.parametrize("micro_batches", [1, 4, 32])
@pytest.mark.parametrize("virtual", [None, 2, 4])
def test_micro_batches_in_flight_follow_the_schedule(virtual, micro_batches):
    for stage in range(4):
        found = micro_batches_in_flight(layout(4, virtual), stage, micro_batches)
        assert found == in_flight_when_simulated(4, stage, virtual or 1, micro_batches)


def test_bubble():
    assert bubble(layout(1), 4) == 0
    assert bubble(layout(4), 12) == 3 / 12
    assert bubble(layout(4, 2), 12) == 3 / 24


def test_checkpoints_that_stay():
    assert checkpoints_that_stay(19_000, 1000, 2000) == 10
    assert checkpoints_that_stay(20_000, 1000, 2000) == 10
    assert checkpoints_that_stay(2500, 1000, None) == 3


def test_hours():
    course = Course(100, 8, 8, 512, 800, 3.6e15, None, None)
    # 100 iterations of 3.6e15 operations on 2 GPUs at 1e14 a second and a half of it
    assert course.hours(2, 0.5, 1e14) == pytest.approx(100 * 3.6e15 / 1e14 / 3600)


def flags(**changed):
    return Namespace(
        **{
            **dict(bf16=True, fp16=False, accumulate_allreduce_grads_in_fp32=True),
            **dict(use_precision_aware_optimizer=False, use_distributed_optimizer=True),
            **dict(tensor_model_parallel_size=2, context_parallel_size=2, world_size=32),
            **dict(expert_model_parallel_size=4, expert_tensor_parallel_size=1),
            **dict(num_distributed_optimizer_instances=1, micro_batch_size=2, seq_length=64),
            **dict(hidden_size=32, kv_channels=8, num_attention_heads=4, num_query_groups=4),
            **dict(group_query_attention=False, ffn_hidden_size=64, padded_vocab_size=128),
            **dict(swiglu=True, untie_embeddings_and_output_weights=True, num_layers=8),
            **dict(num_experts=None, hybrid_layer_pattern=None, moe_layer_freq=1),
            **dict(recompute_granularity=None, recompute_method=None, recompute_num_layers=None),
            **vars(layout(2)),
            **changed,
        }
    )


def test_bytes_of_a_stage():
    stage = Stage(dense=1000, experts=400, layers=4, moe_layers=0, has_head=True)
    found = bytes_of_stage(flags(), stage, 1, 6)
    assert found["weights"] == 2800 and found["gradients"] == 5600
    # 32 ranks / (tensor 2 x pipeline 2) share the state; 32 / (experts 4 x pipeline 2) of experts.
    assert found["optimizer"] == pytest.approx(12 * (1000 / 8 + 400 / 4))
    tokens = 2 * 64 / 2
    of_layer = 2 * (4 * 32 + 2 * 32 + 2 * 32 + 3 * 64)
    assert found["activations"] == tokens * 4 * of_layer / 2
    assert found["head"] == tokens * (128 * 6 / 2 + 4 * 32)
    first = bytes_of_stage(flags(), stage, 0, 6)
    assert first["activations"] == 2 * found["activations"]
    full = flags(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2)
    kept = bytes_of_stage(full, stage, 1, 6)["activations"]
    assert kept == tokens * (2 * 2 * 32 + 2 * of_layer) / 2
    block = flags(recompute_granularity="full", recompute_method="block", recompute_num_layers=3)
    kept = bytes_of_stage(block, stage, 1, 6)["activations"]
    assert kept == tokens * (3 * 2 * 32 + of_layer + of_layer) / 2
    plain = bytes_of_stage(flags(bf16=False, use_distributed_optimizer=False), stage, 1, 6)
    assert plain["weights"] == 5600 and plain["optimizer"] == 1400 * 8


def test_activations_of_blocks_include_their_masks():
    stage = Stage(dense=1000, experts=0, layers=4, moe_layers=0, has_head=False)

    def activations(**changed):
        return bytes_of_stage(flags(**changed), stage, 1, 6)["activations"]

    whole = activations()
    copies = 4 * 2 * (3 * 64) ** 2 / 2  # each of 4 layers copies the part of one text's mask
    blocks = dict(mdm_block_size=8, mdm_views=2)
    assert activations(**blocks) == 1.5 * whole + copies
    whole, one = activations(context_parallel_size=1), 2 * (3 * 64) ** 2
    assert activations(**blocks, context_parallel_size=1) == 1.5 * whole + one
    rows = dict(mdm_block_size_schedule="0:row", context_parallel_size=1)
    assert activations(**rows) == whole
