"""Megatron in a single process, for tests that need a layer or a model but no whole run."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from megatron_mdm.environment import silent_import

with silent_import():
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from megatron_mdm.mcore.device import training_device
    from megatron_mdm.mcore.ranks import one_rank


@contextlib.contextmanager
def on_one_cpu_rank() -> Iterator[None]:
    """Forms Megatron's process groups of this process alone, in Megatron's CPU mode."""
    with training_device("cpu"), one_rank():
        yield


def output_layer(vocabulary: int, hidden: int) -> Any:
    """Megatron's output layer with random weights. Call it inside `on_one_cpu_rank`."""
    config = ModelParallelConfig(
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )
    layer = ColumnParallelLinear(
        hidden, vocabulary, config=config, init_method=torch.nn.init.zeros_, bias=False
    )
    torch.manual_seed(1234)
    torch.nn.init.normal_(layer.weight, std=0.02)
    return layer
