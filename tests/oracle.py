"""The oracle: the objective of one global batch and its gradients, in plain torch.

Tests of both normalizations, of documents, fine-tuning and experts train one step under data
parallelism and gradient accumulation, and compare the loss and every gradient with what this file
computes. It computes them from the definition, in loops over rows and tokens, and it shares with
the program only the model's layers and the integers that the loader gives. It uses none of our
code for rates, masks, weights, normalization, documents, shift or the head, and none of Megatron's
sums over micro-batches and ranks.

One row. It has L = `length` tokens x_1 ... x_L, of which the first n = `num_tokens` are no padding.
The loader gives one integer k_i for each token (`uniforms`) and one for each rate (`quantile`), in
52 bits. An integer k stands for the number (k + 1/2) / 2^52, in (0, 1).

- Documents. A document ends after each end-of-document token, or where the column `document`
  changes if there is one. The padding after the last one counts as a document.
- Parts. A part is a stretch of the row that has a rate of its own: a document with --mdm-rate-per
  document, the row otherwise. Independent of that, the model sees one document at a time with
  --mdm-isolate-documents, the row otherwise: it is called once for each, on these tokens alone, so
  that nothing depends on an attention mask, on positions or on what lies beyond the length.
- Eligible tokens. e_i = 1 for each of the first n tokens that does not end a document; in
  fine-tuning for the tokens of responses. With --mdm-pad-eligible this reaches to L. With
  --mdm-shift the first token that the model sees has no prediction: e_i = 0 there.
- Rate. t is the number of the part's `quantile`, and p = (1 - eps) t + eps. Tokens of
  --mdm-isad-token-ids have p_i = min(p + delta, 1), all others p_i = p.
- Mask. m_i = e_i [u_i < p_i], where u_i is the number of k_i. The model sees the mask token where
  m_i = 1, and x_i elsewhere.
- Loss. With log-probabilities from the logits at i, or at i - 1 with --mdm-shift, part d has

      S_d = sum over i in d of m_i * -log P(x_i | the masked tokens) / p_i,    N_d = sum of e_i.

  The weight 1 / p_i makes the mean of S_d over masks that of all eligible tokens' losses. So N_d
  counts eligible tokens, never masked ones, and a part without a masked token counts with S_d = 0.

The batch, over the parts d of all its rows:

    --mdm-normalization tokens    J = sum S_d / sum N_d
    --mdm-normalization rows      J = mean of S_d / N_d over the parts with N_d > 0

Neither depends on how the batch is cut into micro-batches and ranks, which is what the tests show.
Means of micro-batches' means would be wrong when the N_d differ, and they have to differ here.

Routers of experts add to the gradients, and not to the reported loss. A call of the model on s
tokens gives a router E probabilities P_ie for token i, of which it chooses k experts. With c_ie = 1
where token i chooses expert e, z_i the logarithm of the sum of the exponentials of its logits, and
bars for means over the s tokens:

    R = s / (--seq-length) * (aux_coeff * E / k * sum_e c_e bar * P_e bar  +  z_coeff * mean z_i^2)

The sum of R over calls and routers, divided by the number of rows, is added to J as it is when J is
a mean over rows. It has the same weight for each term of J otherwise: times tokens of the batch /
sum N_d under `tokens`, and times rows / parts with N_d > 0 under `rows` with rates of documents.

Rates that are not uniform, exact counts and views have oracles of their own in tests/objective.
"""

import os

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from megatron_mdm.mcore.device import replaced
from megatron_mdm.mcore.training import objective as program
from megatron_mdm.pretrain import main


def whole_batch() -> None:
    """The objective of one global batch in plain torch, without our loss and Megatron's sums.

    Saves the loss and every gradient; to be started on one rank with the whole batch as
    micro-batch.
    """

    def forward_step(state, iterator, model):
        args = get_args()
        routers = _router_inputs(model)
        batch = next(iterator)
        rows = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        draws = [draw for row in rows for draw in _draws(row, model, args)]
        sums, counts = zip(*draws, strict=True)
        assert len(set(counts)) > 1, "rows should differ"
        if args.mdm_normalization == "tokens":
            loss = sum(sums) / sum(counts)
        else:
            loss = sum(x / n for x, n in draws if n) / sum(n > 0 for n in counts)
        inner = unwrap_model(model)
        names, parameters = zip(*inner.named_parameters(), strict=True)
        routed = sum(_router_losses(args, *router) for router in routers) / len(rows)
        if args.mdm_normalization == "tokens":
            routed = routed * batch["tokens"].numel() / sum(counts)
        elif args.mdm_rate_per == "document":
            routed = routed * len(rows) / sum(n > 0 for n in counts)
        MoEAuxLossAutoScaler.set_loss_scale(torch.zeros(1))  # Megatron's own stay out
        gradients = torch.autograd.grad(loss + routed, parameters)
        torch.save(
            (loss.item(), dict(zip(names, gradients, strict=True))),
            f"{os.environ['TRACE_DIR']}/whole_batch.pt",
        )
        raise SystemExit(0)

    with replaced(program, "forward_step", forward_step):
        main()


def _router_inputs(model):
    """A list that a call of the model fills with (router, its input [s, b, h])."""
    seen = []
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(lambda router, args, _: seen.append((router, args[0])))
    return seen


def _router_losses(args, router, x):
    """Balance of a row (Switch Transformer's) and z-loss of its tokens: means, weighted.

    A row that ends early, x [s, 1, h] with s below --seq-length, counts for as much less.
    """
    logits = x.double() @ router.weight.double().t()
    num_experts = logits.shape[-1]
    p = logits.softmax(dim=-1)
    chosen = torch.zeros_like(p).scatter(-1, p.topk(args.moe_router_topk).indices, 1.0)
    rows = num_experts * (chosen.mean(dim=0) * p.mean(dim=0)).sum(dim=-1) / args.moe_router_topk
    z_loss = logits.logsumexp(dim=-1).square().mean()
    loss = args.moe_aux_loss_coeff * rows.mean() + args.moe_z_loss_coeff * z_loss
    return loss * x.shape[0] / args.seq_length


def _draws(row, model, args):
    """(weighted loss, eligible tokens) of each part of a row that has a rate of its own.

    The model sees one document at a time with --mdm-isolate-documents, and never what lies beyond
    the length of a row.
    """
    tokens = row["tokens"]
    n, length = int(row["num_tokens"]), int(row["length"])
    ends = [i + 1 for i in range(n) if tokens[i] == 119]
    if "document" in row:
        ends = [i + 1 for i in range(n - 1) if row["document"][i] != row["document"][i + 1]]
    ends = sorted({*ends, n, length})
    documents = [(low, high) for low, high in zip([0, *ends], ends, strict=False) if low < high]
    seen = documents if args.mdm_isolate_documents else [(0, length)]
    drawn = documents if args.mdm_rate_per == "document" else [(0, length)]

    eligible = torch.zeros(len(tokens), dtype=torch.bool)
    for i in range(length if args.mdm_pad_eligible else n):
        # In `ranks.write_pairs` the tokens of a prompt, and no others, are below 50.
        eligible[i] = tokens[i] >= 50 if args.mdm_sft else tokens[i] != 119
    if args.mdm_shift:
        eligible[[low for low, _ in seen]] = False
    p = torch.ones(len(tokens), dtype=torch.float64)
    for quantile, (low, high) in zip(row["quantile"].view(-1).double(), drawn, strict=False):
        p[low:high] = (1 - args.mdm_eps) * (quantile + 0.5) * 2.0**-52 + args.mdm_eps
    for token in args.mdm_isad_token_ids or ():
        p[tokens == token] = (p[tokens == token] + args.mdm_isad_delta).clamp(max=1)
    mask = ((row["uniforms"].double() + 0.5) * 2.0**-52 < p) & eligible
    corrupted = torch.where(mask, args.mdm_mask_token_id, tokens)
    logits = torch.cat([model(corrupted[None, low:high], None, None)[0] for low, high in seen])
    if args.mdm_shift:
        logits = torch.cat([logits[:1], logits[:-1]])
    log_p = logits.log_softmax(dim=-1).gather(-1, tokens[:length, None])[:, 0]
    weighted = -(log_p * mask[:length] / p[:length])
    return [(weighted[low:high].sum(), int(eligible[low:high].sum())) for low, high in drawn]
