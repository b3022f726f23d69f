"""The same network on the same rows, trained autoregressively by Megatron.

    python -m megatron_mdm.experiments.autoregressive --mdm-shift ...

takes the flags of `-m megatron_mdm.pretrain`, --mdm-shift among them, since the logits of a
position predict the token after it. Rows, their order and the tokens that count are those of masked
diffusion; attention is causal and no token is masked.
"""

import time
from functools import partial
from typing import Any, Literal

from megatron_mdm.config import requested_device
from megatron_mdm.environment import prepare_environment
from megatron_mdm.errors import UserError, exit_rank_with


def main() -> None:
    """Trains; a `UserError` ends it with one line and status 2."""
    prepare_environment(requested_device())
    from megatron_mdm.mcore.device import training_device

    with training_device(requested_device()):
        from megatron.core.enums import ModelType
        from megatron.training import pretrain, set_startup_timestamps
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        from megatron_mdm import plugin as mdm
        from megatron_mdm.mcore.flags.arguments import parse

        set_startup_timestamps(program_start=time.time(), main_entry=time.time())
        mdm.use_shipped_dataset_helpers()
        args = parse()
        if not args.mdm_shift:
            raise UserError("--mdm-shift is missing: an autoregressive model predicts ahead")
        if args.mdm_isolate_documents:
            raise UserError("--mdm-isolate-documents: this program keeps no documents apart")
        objective = mdm.build_objective(args)
        pretrain(
            pretrain_cfg_container_from_args(args, objective.model_config),
            objective.datasets_provider,
            ModelType.encoder_or_decoder,
            partial(forward_step, objective.state),
        )


def forward_step(state: Any, data_iterator: Any, model: Any) -> tuple[Any, Any]:
    """Megatron's next-token cross entropy of one micro-batch, and how to average it."""
    from megatron_mdm.mcore.model.inputs import ModelInputs
    from megatron_mdm.mcore.training.forward_step import next_batch

    batch = next_batch(state, data_iterator, model.training)
    inputs = ModelInputs.of_batch(batch, model, causal=True)
    cross_entropy = inputs.cross_entropy(model, batch.tokens)
    return cross_entropy, partial(loss_func, batch.eligible, state.mdm.normalization)


def loss_func(
    eligible: Any, normalization: Literal["tokens", "rows"], cross_entropy: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """Sums over a micro-batch, averaged like the loss of masked diffusion.

    Args:
        eligible: tokens that count, bool [b, s].
        normalization: `tokens` or `rows`.
        cross_entropy: of the token after each position, float [b, s], nats.
    """
    import torch

    from megatron_mdm.mcore.model.inputs import logits_to_tokens
    from megatron_mdm.objective.loss import row_losses

    values = logits_to_tokens(cross_entropy, shift=True)
    losses = row_losses(
        values, eligible, torch.ones_like(values), eligible.sum(dim=1), normalization
    )
    report = torch.stack([losses.numerator.detach(), losses.denominator.float()])
    return losses.numerator, losses.denominator.to(torch.int), {"lm loss": report}


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        exit_rank_with(error)
