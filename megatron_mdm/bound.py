"""Whether the training loss is a bound on the negative log-likelihood, and why it is not."""

from megatron_mdm.config import MDMConfig

# Bernoulli masks never use masking probabilities below eps, so they leave out a share eps of the
# objective. Up to this share the loss still counts as a bound.
MOST_EPS = 0.01


def why_no_bound(mdm: MDMConfig, uniform_share: float) -> str | None:
    """Says in a few words why the training loss is not a bound; None if it is one.

    The loss is a bound if the density of t times its importance weight is 1, and masks and their
    weights are those of the objective. The mean of the loss is then the NELBO: an upper bound on
    the negative log-likelihood of the eligible tokens, per eligible token, given all other tokens.
    These settings break the bound:

    - `clipped` rates leave out some t. With the limits 0 and 1 they leave out none.
    - `flat` and a bell weight some t more than others. A bell as `proposal` keeps the bound,
      because it is weighted by one over its density. At a uniform share of 1 a bell is the uniform
      density.
    - ISAD with `inclusion` weights predicts tokens from contexts that are drawn too often. ISAD
      with `exact` weights, or with an --mdm-isad-delta of 0, does not.
    - SyRM masks prompt tokens too: it predicts them, and predicts responses from prompts with gaps.
      The loss then bounds the likelihood of another text.
    - --mdm-rate-per document without --mdm-isolate-documents: each document has its own masking
      rate and is predicted from the visible tokens of the other documents. No likelihood of the
      row is the product of these predictions.
    - --mdm-shift-first noisy predicts the first token of a block from the noisy block before it,
      which is not what the block is given.
    - --mdm-confidence-loss adds entropies, which belong to no likelihood. The loss that the logs
      show leaves them out.
    - Bernoulli masks leave out a share eps of the rates. Up to `MOST_EPS` the loss still counts as
      a bound.

    These settings keep the bound:

    - P-POTS: it is weighted by one over its density. Quantiles and views: each row's t is uniform.
    - Tokens that are never masked: prompts, ends of documents that are not eligible, and the first
      token with --mdm-shift. The bound is that of the other tokens, given these.
    - --mdm-pad-eligible and --mdm-pad-response-to-multiple-of: the bound is that of the padded
      response. Generation writes the padding too.
    - --mdm-random-length-fraction: the bound is that of the shortened texts.
    - Blocks: the loss of each block is a bound, given the clean blocks before it.
    - --mdm-isolate-documents with one rate a row: the mask of a row, restricted to one document, is
      a mask of that document.
    - Attention that is still annealed (--mdm-anneal-attention-iters), attention that leaves tokens
      out, noise on embeddings, and dropout: they change the network. The bound is that of the
      network as it is in training.

    Args:
        mdm: settings of the objective.
        uniform_share: share of the uniform density in the bell in use. For a loss averaged over
            rows, the mean of this share over the rows. 1 if the density is not a bell.
    """
    weighs = mdm.bell is not None and mdm.bell_role != "proposal"
    sees_others = mdm.rate_per == "document" and not mdm.isolate_documents
    reasons = {
        "clipped": mdm.rate_sampler == "clipped" and mdm.clip != [0.0, 1.0],
        "flat": mdm.rate_sampler == "flat",
        f"bell, uniform share {_share(uniform_share)}": weighs and uniform_share < 1.0,
        "ISAD with inclusion weights": bool(mdm.isad_token_ids)
        and mdm.isad_weight == "inclusion"
        and mdm.isad_delta > 0.0,
        "SyRM": bool(mdm.syrm_token_ids) or mdm.syrm_fraction > 0.0,
        "rates of documents that see each other": sees_others,
        "first tokens of blocks read noisy tokens": mdm.shift_first == "noisy",
        "confidence loss": mdm.confidence_loss > 0.0,
        f"eps {mdm.eps:g}": mdm.mask == "bernoulli" and mdm.eps > MOST_EPS,
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds) or None


def bound_in_words(mdm: MDMConfig) -> str | None:
    """The line that a run prints at its start; None if its loss is a bound from the start.

    Args:
        mdm: settings of the objective.
    """
    reason = why_no_bound(mdm, 1.0 if mdm.bell_fade == [0.0, 0.0] else mdm.bell_uniform_share)
    rest = why_no_bound(mdm, 1.0)
    if reason is None:
        return None
    line = f"the training loss is no bound on the negative log-likelihood: {reason}"
    if rest == reason or mdm.bell_fade is None:
        return f"{line}. The NELBO of evaluations is one"
    end = "when --mdm-bell-fade has brought the uniform share to 1"
    if rest is None:
        return f"{line}. It becomes one {end}; the NELBO of evaluations is one all along"
    return f"{line}; {end}, still for {rest}. The NELBO of evaluations is one"


def _share(share: float) -> str:
    """Formats a share below 1 with two decimals, or more if it is small; never as 1.00."""
    return f"{share:.2g}" if share < 0.01 else f"{min(share, 0.99):.2f}"
