"""What the ranks of the tests run: the program, with a record of the rows that each rank saw."""

import os

import torch
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from megatron_mdm.mcore import forward_step as step
from megatron_mdm.mcore import pretrain as program
from megatron_mdm.pretrain import main


def train() -> None:
    """The program as a user starts it, recording (split, row) -> (t, masked tokens)."""
    trace: dict = {}
    load_rows, corrupt = step.load_rows, step.corrupt
    seen: dict = {}

    def recording_load_rows(*args):
        seen["rows"] = load_rows(*args)
        return seen["rows"]

    def recording_corrupt(*args, **kwargs):
        corruption = corrupt(*args, **kwargs)
        keys = zip(seen["rows"].split.tolist(), seen["rows"].row.tolist(), strict=True)
        values = zip(corruption.t.tolist(), corruption.tokens.tolist(), strict=True)
        for key, value in zip(keys, values, strict=True):
            assert trace.setdefault(key, value) == value
        return corruption

    step.load_rows, step.corrupt = recording_load_rows, recording_corrupt
    try:
        main()
    finally:
        torch.save(trace, f"{os.environ['TRACE_DIR']}/trace{os.environ['RANK']}.pt")


def whole_batch() -> None:
    """The objective of one global batch in plain torch, without our loss and Megatron's sums.

    Saves the loss and every gradient; to be started on one rank with the whole batch as
    micro-batch.
    """

    def forward_step(iterator, model):
        args = get_args()
        rows = {name: value.double() for name, value in next(iterator).items()}
        tokens = rows["tokens"].long()
        eligible = tokens != 119
        eligible_counts = eligible.sum(dim=1)
        assert len(set(eligible_counts.tolist())) > 1, "rows should differ"
        p = (1 - args.mdm_eps) * (rows["quantile"] + 0.5) * 2.0**-52 + args.mdm_eps
        mask = ((rows["uniforms"] + 0.5) * 2.0**-52 < p[:, None]) & eligible
        logits = model(torch.where(mask, args.mdm_mask_token_id, tokens), None, None)
        log_p = logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
        weighted = -(log_p * mask / p[:, None]).sum(dim=1)
        if args.mdm_normalization == "tokens":
            loss = weighted.sum() / eligible_counts.sum()
        else:
            loss = (weighted / eligible_counts).mean()
        inner = unwrap_model(model)
        names, parameters = zip(*inner.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters)
        torch.save(
            (loss.item(), dict(zip(names, gradients, strict=True))),
            f"{os.environ['TRACE_DIR']}/whole_batch.pt",
        )
        raise SystemExit(0)

    program.forward_step = forward_step
    main()
