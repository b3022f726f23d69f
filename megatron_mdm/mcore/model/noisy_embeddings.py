"""Noise on the embeddings of masked tokens, added where Megatron's embedding ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.utils import get_model_config, unwrap_model

from megatron_mdm.mcore.model.context_parallel import sequence_parallel_part, shard_sequence
from megatron_mdm.objective.embedding_noise import normals


@contextmanager
def noisy_embeddings(
    model: Any, std: float, keys: torch.Tensor, masked: torch.Tensor
) -> Iterator[None]:
    """Context in which a stage adds noise to the embeddings of masked positions.

    Stages without an embedding add nothing. Each rank makes the numbers of its own positions.

    Args:
        model: a stage of the model.
        std: standard deviation of the noise.
        keys: see `noise_keys`, int64 [b, s] for whole rows of the model.
        masked: positions that get noise, bool [b, s].
    """
    embedding = getattr(unwrap_model(model), "embedding", None)
    if embedding is None:
        yield
        return
    parts, part = sequence_parallel_part(get_model_config(model))
    own_keys, own_masked = (shard_sequence(x).t().tensor_split(parts)[part] for x in (keys, masked))

    def add(_: Any, __: Any, embeddings: torch.Tensor) -> torch.Tensor:
        noise = normals(own_keys, embeddings.shape[2]) * (std * own_masked[..., None])
        return embeddings + noise.to(embeddings.dtype)

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
