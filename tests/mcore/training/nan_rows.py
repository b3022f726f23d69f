"""An entry with a NaN row, for tests of its effect on a run."""

import torch

from megatron_mdm.mcore.training import forward_step as step
from megatron_mdm.pretrain import main


def nan_row() -> None:
    """Runs the program with NaN cross entropies and gradients in the first row."""
    logits_to_tokens, calls = step.logits_to_tokens, []

    def with_nan(*words):
        values = logits_to_tokens(*words)
        calls.append(values)
        if len(calls) > 1:
            return values
        return values * torch.ones_like(values).index_fill(0, torch.tensor([0]), torch.nan)

    step.logits_to_tokens = with_nan
    main()
