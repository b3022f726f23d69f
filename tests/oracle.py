"""The oracle: the objective of one global batch and its gradients, in plain torch.

Tests of both normalizations, of documents, of fine-tuning and of experts train one step under data
parallelism and gradient accumulation. They compare the loss and every gradient with the results of
this file. This file computes them from the definition, in loops over rows and tokens. It shares
only two things with the program: the model's layers, and the integers that the data loader gives.
It uses none of our code for rates, masks, weights, normalization, documents, shift or the head, and
none of Megatron's sums over micro-batches and ranks.

One row. It has L = `length` tokens x_1 ... x_L. The first n = `num_tokens` of them are not padding.
The loader gives one integer k_i for each token (`uniforms`) and one for each rate (`quantile`),
each of 52 bits. An integer k stands for the number (k + 1/2) / 2^52, in (0, 1).

- Documents. A document ends after each end-of-document token, or where the column `document`
  changes if the row has that column. The padding after the last document counts as a document.
- Parts. A part is a stretch of the row that has its own rate. It is a document with --mdm-rate-per
  document, a block with --mdm-rate-per block, and the whole row otherwise. Independently of that,
  the model sees one document at a time with --mdm-isolate-documents, and the whole row otherwise.
  The oracle calls the model once for each document, on its tokens alone. The result thus depends on
  no attention mask, on no positions and on no token beyond the length.
- Blocks. With --mdm-block-size N the stretch that the model sees is cut into blocks of N tokens.
  The oracle calls the model once for each block k: on the clean tokens before it and its own masked
  tokens. A token attends to the tokens of its own block and of earlier ones. There are no clean
  copies, and no token is seen twice. With --mdm-ar-loss-weight the clean tokens attend to those
  before them only, and a further call on the clean tokens gives the next-token loss.
- Eligible tokens. e_i = 1 for each of the first n tokens that does not end a document; in
  fine-tuning, for the tokens of responses. With --mdm-pad-eligible, tokens up to L count too. With
  --mdm-shift the first token that the model sees has no prediction: e_i = 0 there.
- Rate. t is the number that the part's `quantile` stands for, and p = (1 - eps) t + eps. Tokens of
  --mdm-isad-token-ids have p_i = min(p + delta, 1), all others have p_i = p.
- Mask. m_i = e_i [u_i < p_i], where u_i is the number that k_i stands for. The model sees the mask
  token where m_i = 1, and x_i elsewhere.
- Loss. The log-probabilities come from the logits at i, or at i - 1 with --mdm-shift. Part d has

    S_d = sum over i in d of m_i * -log P(x_i | the masked tokens) / p_i,    N_d = sum of e_i.

  The weight 1 / p_i makes the mean of S_d over masks equal to the sum of the losses of all
  eligible tokens. N_d therefore counts eligible tokens, never masked ones, and a part without a
  masked token counts with S_d = 0.

The batch, over the parts d of all its rows:

    --mdm-normalization tokens    J = sum S_d / sum N_d
    --mdm-normalization rows      J = mean of S_d / N_d over the parts with N_d > 0

Blocks are no parts of this mean: S_d and N_d are then sums over the blocks of a document or,
without --mdm-isolate-documents, of a row.

Neither J depends on how the batch is cut into micro-batches and ranks, and the tests show this. A
mean of micro-batch means would be wrong when the N_d differ, and the oracle asserts that they
differ.

With --mdm-confidence-loss W the gradient is that of J + W C. C is J with the entropy of the
predicted distribution of token i in place of -log P(x_i | ...) where x_i has the greatest logit,
and with 0 elsewhere.

The routers of experts add to the gradients, but not to the reported loss. In a call of the model on
s tokens, a router computes E probabilities P_ie for token i and chooses k experts. Let c_ie = 1
where token i chooses expert e, let z_i be the log-sum-exp of the router's logits of token i, and
let bars be means over the s tokens:

    R = s / (--seq-length) * (aux_coeff * E / k * sum_e c_e bar * P_e bar  +  z_coeff * mean z_i^2)

The sum of R over calls and routers, divided by the number of rows, is added to J. Where J is a mean
over rows, it is added unchanged. Otherwise it is scaled so that its weight relative to each term of
J stays the same: by (tokens of the batch) / (sum N_d) under `tokens`, and by rows / (parts with N_d
> 0) under `rows` with rates per document.

With blocks a row of the model has s = (K + 1) L positions: the masked tokens of K views of a text,
and its clean tokens once. R is then computed once for each text, from the masked tokens of each
block's call and from a further call on the clean tokens, and s / (--seq-length) is replaced by
s / ((K + 1) * (--seq-length)). Its mean over texts is added to J as above.

Non-uniform rates, exact counts and views have oracles of their own in tests/objective.
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
    """Computes the objective of one global batch in plain torch.

    It uses neither our loss nor Megatron's sums, and saves the loss and every gradient. Launch it
    on one rank, with the whole batch as one micro-batch.
    """

    def forward_step(state, iterator, model):
        args = get_args()
        routers = _router_inputs(model)
        batch = next(iterator)
        rows = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        draws, views = [], args.mdm_views if args.mdm_block_size else 1
        for number, row in enumerate(rows):
            if number % views == 0:
                since = len(routers)
            draws += _draws(row, model, args, routers, with_clean=number % views == 0)
            if args.mdm_block_size and (number + 1) % views == 0:
                routers[since:] = _merged(routers[since:])
        sums, following, entropies, counts = zip(*draws, strict=True)
        assert len(set(counts)) > 1, "rows should differ"

        def mean(sums):
            if args.mdm_normalization == "tokens":
                return sum(sums) / sum(counts)
            pairs = zip(sums, counts, strict=True)
            return sum(x / n for x, n in pairs if n) / sum(n > 0 for n in counts)

        loss = mean(sums)
        total = loss + args.mdm_ar_loss_weight * mean(following)
        confidence = mean(entropies)
        total = total + args.mdm_confidence_loss * confidence
        assert not args.mdm_confidence_loss or confidence > 0, "some predictions should be right"
        inner = unwrap_model(model)
        names, parameters = zip(*inner.named_parameters(), strict=True)
        routed = sum(_router_losses(args, *router) for router in routers) * views / len(rows)
        if args.mdm_normalization == "tokens":
            routed = routed * batch["tokens"].numel() / sum(counts)
        elif args.mdm_rate_per == "document":
            routed = routed * len(rows) / sum(n > 0 for n in counts)
        MoEAuxLossAutoScaler.set_loss_scale(torch.zeros(1))  # Megatron's own router losses are off
        gradients = torch.autograd.grad(total + routed, parameters)
        torch.save(
            (loss.item(), confidence.item(), dict(zip(names, gradients, strict=True))),
            f"{os.environ['TRACE_DIR']}/whole_batch.pt",
        )
        raise SystemExit(0)

    with replaced(program, "forward_step", forward_step):
        main()


def _router_inputs(model):
    """A list to which each call of the model appends (router, its input [s, b, h]) per router."""
    seen = []
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(lambda router, args, _: seen.append((router, args[0])))
    return seen


def _merged(routers):
    """One entry for each router, whose input has the positions of all its calls."""
    inputs = {}
    for router, x in routers:
        inputs.setdefault(router, []).append(x)
    return [(router, torch.cat(parts)) for router, parts in inputs.items()]


def _router_losses(args, router, x):
    """Weighted sum of a row's load-balancing loss (Switch Transformer) and its mean z-loss.

    A row that ends early, x [s, 1, h] with s below --seq-length, has a weight smaller by s /
    --seq-length; with blocks, below (--mdm-views + 1) --seq-length.
    """
    logits = x.double() @ router.weight.double().t()
    num_experts = logits.shape[-1]
    p = logits.softmax(dim=-1)
    chosen = torch.zeros_like(p).scatter(-1, p.topk(args.moe_router_topk).indices, 1.0)
    rows = num_experts * (chosen.mean(dim=0) * p.mean(dim=0)).sum(dim=-1) / args.moe_router_topk
    z_loss = logits.logsumexp(dim=-1).square().mean()
    loss = args.moe_aux_loss_coeff * rows.mean() + args.moe_z_loss_coeff * z_loss
    copies = args.mdm_views + 1 if args.mdm_block_size else 1
    return loss * x.shape[0] / (copies * args.seq_length)


def _draws(row, model, args, routers, with_clean):
    """(weighted loss, next-token loss, weighted entropies, eligible tokens) of each part.

    A part counts as one. The entropies are those of masked tokens that have the greatest logit.

    The model sees one document at a time with --mdm-isolate-documents, and never a token beyond the
    length of the row. `routers` has the inputs of the routers. With blocks and experts, those of
    the clean tokens are added if `with_clean`.
    """
    tokens = row["tokens"]
    n, length = int(row["num_tokens"]), int(row["length"])
    ends = [i + 1 for i in range(n) if tokens[i] == 119]
    if "document" in row:
        ends = [i + 1 for i in range(n - 1) if row["document"][i] != row["document"][i + 1]]
    ends = sorted({*ends, n, length})
    documents = [(low, high) for low, high in zip([0, *ends], ends, strict=False) if low < high]
    seen = documents if args.mdm_isolate_documents else [(0, length)]
    blocks = [
        (at, min(at + args.mdm_block_size, high))
        for low, high in seen
        for at in range(low, high, args.mdm_block_size or high - low)
        if args.mdm_block_size
    ]
    drawn = {"row": [(0, length)], "document": documents, "block": blocks}[args.mdm_rate_per]
    parts = drawn if args.mdm_rate_per != "block" else seen

    eligible = torch.zeros(len(tokens), dtype=torch.bool)
    for i in range(length if args.mdm_pad_eligible else n):
        # `ranks.write_pairs` writes data whose prompts, and nothing else, have tokens below 50.
        eligible[i] = tokens[i] >= 50 if args.mdm_sft else tokens[i] != 119
        eligible[i] |= int(tokens[i]) in (args.mdm_syrm_token_ids or ())
    if args.mdm_shift:
        eligible[[low for low, _ in seen]] = False
    p = torch.ones(len(tokens), dtype=torch.float64)
    for quantile, (low, high) in zip(row["quantile"].view(-1).double(), drawn, strict=False):
        p[low:high] = (1 - args.mdm_eps) * (quantile + 0.5) * 2.0**-52 + args.mdm_eps
    for token in args.mdm_isad_token_ids or ():
        p[tokens == token] = (p[tokens == token] + args.mdm_isad_delta).clamp(max=1)
    mask = ((row["uniforms"].double() + 0.5) * 2.0**-52 < p) & eligible
    corrupted = torch.where(mask, args.mdm_mask_token_id, tokens)
    if blocks:
        calls = [_logits_of_blocks(tokens, corrupted, *ends, model, args, routers) for ends in seen]
        for low, high in seen if with_clean and args.num_experts else ():
            places = torch.arange(high - low) // args.mdm_block_size
            model(tokens[None, low:high], None, (places[None] > places[:, None])[None, None])
    else:
        calls = [model(corrupted[None, low:high], None, None)[0] for low, high in seen]
    logits = torch.cat(calls)
    if args.mdm_shift and not blocks:
        logits = torch.cat([logits[:1], logits[:-1]])
    whole = logits.log_softmax(dim=-1)
    log_p = whole.gather(-1, tokens[:length, None])[:, 0]
    weighted = -(log_p * mask[:length] / p[:length])
    right = logits.argmax(dim=-1) == tokens[:length]
    entropies = -(whole.exp() * whole).sum(dim=-1) * (right & mask[:length]) / p[:length]
    following = torch.zeros_like(weighted)
    for low, high in seen if args.mdm_ar_loss_weight else ():
        n = high - low
        later = torch.ones(n, n).triu(1).bool()[None, None]
        log_p = model(tokens[None, low:high], None, later)[0].log_softmax(dim=-1)
        following[low + 1 : high] = -log_p[:-1].gather(-1, tokens[low + 1 : high, None])[:, 0]
    following = following * eligible[:length]
    return [
        (
            *(x[low:high].sum() for x in (weighted, following, entropies)),
            int(eligible[low:high].sum()),
        )
        for low, high in parts
    ]


def _logits_of_blocks(tokens, corrupted, low, high, model, args, routers):
    """The logits that predict each token from `low` to `high`: one call for each block."""
    found, size = [], args.mdm_block_size
    before = None  # logits at the last token of the block before, whose tokens were masked
    for start in range(low, high, size):
        end = min(start + size, high)
        seen = torch.cat([tokens[low:start], corrupted[start:end]])[None]
        places = torch.arange(end - low)
        hidden = places[None] // size > places[:, None] // size
        if args.mdm_ar_loss_weight:
            is_clean = places[:, None] < start - low
            hidden = hidden | is_clean & (places[None] > places[:, None])
        since = len(routers)
        logits = model(seen, None, hidden[None, None])[0]
        routers[since:] = [(router, x[start - low :]) for router, x in routers[since:]]
        own = logits[start - low :]
        if args.mdm_shift:
            first = own[:1] if start == low else logits[start - low - 1 : start - low]
            if args.mdm_shift_first == "noisy" and before is not None:
                first = before
            before, own = own[-1:], torch.cat([first, own[:-1]])
        found.append(own)
    return torch.cat(found)
