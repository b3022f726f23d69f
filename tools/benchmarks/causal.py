"""Megatron's own GPT objective in its smallest form, for the comparison in `throughput`.

The loss is the cross entropy of the next token at all positions of GPTDataset's rows. It is
computed as in Megatron's pretraining script, which Megatron's wheel does not contain: with the loss
mask, the checks for NaN and infinity, and the sums of loss and tokens.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import get_args
from megatron.training.global_vars import get_tokenizer


def causal_datasets(num_samples: list[int]) -> list[Any]:
    """Megatron's `dataset_provider` for GPTDataset; the model makes the attention masks."""
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=(args.data_path, None),
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, num_samples, lambda: True, config).build()


causal_datasets.is_distributed = True  # type: ignore[attr-defined]


def causal_forward_step(rows: Iterator, model: Any) -> tuple[torch.Tensor, Callable]:
    """Megatron's `forward_step` for one rank."""
    device = torch.cuda.current_device()
    batch = {name: value.to(device, non_blocking=True) for name, value in next(rows).items()}
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(_loss_func, batch["loss_mask"])


def _loss_func(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    loss = (losses.float() * loss_mask).sum()
    if get_args().check_for_nan_in_loss_and_grad:
        for is_bad in (torch.isnan, torch.isinf):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=is_bad,
                message="found NaN or infinity in the loss of a micro-batch",
                tolerance=0.0,
                fatal=True,
            )
    num_tokens = loss_mask.sum().detach().to(torch.int)
    report = torch.stack([loss.detach(), num_tokens.float()])
    return loss, num_tokens, {"lm loss": report}
