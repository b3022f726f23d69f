"""Megatron's own view of a model: its arguments, its checkpoint's keys and shapes, its logits.

Megatron parses the flags that the launch line prints, and builds the model from them: on PyTorch's
meta device, without memory, for keys and shapes; on the CPU for logits.
"""

import contextlib
import io
import logging
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.arguments import parse_args, validate_args
from megatron.training.models.gpt import GPTModelBuilder
from megatron.training.models.hybrid import HybridModelBuilder

from megatron_mdm.config import MDMConfig
from megatron_mdm.conversion.layout import LOCAL_NORM, TE_NORM
from megatron_mdm.conversion.torch_dist import CONTENT_METADATA, HYBRID_NORM
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.device import training_device
from megatron_mdm.mcore.flags.arguments import add_arguments
from megatron_mdm.mcore.model.builder import model_config
from megatron_mdm.mcore.ranks import one_rank

_ROUTER = "mlp.router.weight"

# Required flags that do not describe the model. The run that loads the checkpoint sets its own.
_RUN = "--micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1e-5".split()


@dataclass(frozen=True)
class CheckpointContents:
    """The tensors and objects that a checkpoint of a model has to hold.

    Attributes:
        shapes: key -> shape of every tensor.
        objects: keys of the extra states, which are no tensors.
    """

    shapes: dict[str, tuple[int, ...]]
    objects: list[str]


def arguments(flags: Sequence[str]) -> Namespace:
    """Returns Megatron's validated arguments, as a checkpoint written on GPUs records them."""
    with training_device("cpu"):
        return _parse(flags)


def checkpoint_contents(flags: Sequence[str]) -> CheckpointContents:
    """Returns the keys and shapes of a checkpoint of the model that these flags build."""
    with _model(flags, "meta") as model:
        state = model.sharded_state_dict(metadata=dict(CONTENT_METADATA))
        apply_factories(state)
    shapes, objects = {}, []
    for item in nested_values(state):
        if isinstance(item, ShardedTensor):
            shapes[item.key] = tuple(item.global_shape)
        else:
            objects.append(item.unique_key)
    for key in [key for key in shapes if key.endswith(_ROUTER)]:
        layer = key.removesuffix(_ROUTER)
        shapes[layer + TE_NORM] = shapes[layer + LOCAL_NORM]
    # Transformer Engine's norms have an extra state; Megatron's own norms have none.
    for key, shape in shapes.items():
        if key.endswith(("layernorm.weight", HYBRID_NORM)):
            name = key.removesuffix("weight") + "_extra_state"
            count = shape[0] if len(shape) > 1 else 1
            objects += [f"{name}/shard_{n}_{count}" for n in range(count)]
    return CheckpointContents(shapes, sorted(set(objects)))


@torch.no_grad()
def logits(
    flags: Sequence[str], checkpoint: Path, tokens: torch.Tensor, dtype: torch.dtype | None
) -> torch.Tensor:
    """Computes logits with Megatron's model from a checkpoint, in float32 with full attention.

    Args:
        flags: flags of the model, without precision flags.
        checkpoint: directory with the files of one iteration.
        tokens: int64 [b, s].
        dtype: the weights are first rounded to this dtype; None: they are not rounded.

    Returns:
        float32 [b, s, padded vocabulary].
    """
    with _model(flags, "cpu") as model:
        state = model.sharded_state_dict(metadata=dict(CONTENT_METADATA))
        names = set(state)
        loaded = dist_checkpointing.load(state, str(checkpoint))  # has more than the model's names
        model.load_state_dict({name: loaded[name] for name in names})
        round_weights(model, dtype)
        # Attention asks for its dropout generator even if the dropout rate is 0.
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        logits: torch.Tensor = model.eval()(tokens, positions, None)
        return logits


def round_weights(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    """Rounds float32 weights in place to values of `dtype`; None leaves them unchanged."""
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).float()


@contextlib.contextmanager
def _model(flags: Sequence[str], device: str) -> Iterator[Any]:
    """Builds Megatron's model on one rank, with uninitialized weights."""
    with training_device("cpu"), one_rank(), _quiet():
        args = _parse([*flags, "--mdm-device", "cpu"])
        args.perform_initialization = False
        groups = ProcessGroupCollection.use_mpu_process_groups()
        with torch.device(device):
            config = model_config(args, MDMConfig.from_args(args))
            builder = HybridModelBuilder if args.hybrid_layer_pattern else GPTModelBuilder
            model = builder(config).build_model(groups)
        yield model


def _parse(flags: Sequence[str]) -> Namespace:
    before = sys.argv
    sys.argv = ["pretrain", *flags, *_RUN]  # Megatron parses the command line itself
    refusal = io.StringIO()
    try:
        with _quiet(), contextlib.redirect_stderr(refusal):
            args: Namespace = parse_args(add_arguments)
            validate_args(args)
    except UserError:
        raise
    except (AssertionError, ValueError, SystemExit) as error:
        reason = " ".join((refusal.getvalue() or str(error)).split()).rpartition("error: ")[2]
        raise UserError(
            f"Megatron rejects this model: {reason} (flags: {' '.join(flags)})"
        ) from None
    finally:
        sys.argv = before
    return args


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses Megatron's list of arguments and its notices."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
