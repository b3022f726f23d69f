"""Whether the training loss is a bound on the negative log-likelihood, and why it is not."""

from megatron_mdm.config import MDMConfig

# The share of the objective's weight that Bernoulli masks may leave out and still be called right:
# rates below eps, at which masks are not drawn.
MOST_EPS = 0.01


def why_no_bound(mdm: MDMConfig, uniform_share: float) -> str | None:
    """Says in a few words why the training loss is no bound; None: it is one.

    It is one where the density of t times its importance weight is 1, and masks and weights are
    those of the objective. The mean of the loss is then the NELBO: an upper bound on the negative
    log-likelihood of the eligible tokens, per eligible token, given all others. These change that:

    - `clipped` rates leave out some t. With the ends 0 and 1 they leave out none.
    - `flat` and a bell weigh some t more than others. A bell as `proposal` is weighted by one over
      its density, and at a uniform share of 1 a bell is the uniform itself.
    - ISAD with `inclusion` weights predicts tokens from contexts that are drawn too often. With
      `exact` weights, or an --mdm-isad-delta of 0, it does not.
    - SyRM predicts responses from prompts with gaps, and prompts too: a bound of another text.
    - Documents that see each other, each masked at a rate of its own (--mdm-rate-per document
      without --mdm-isolate-documents), are each predicted from what the others happen to show. No
      likelihood of the row is the product of these.
    - Bernoulli masks leave out the share eps of the rates. Up to `MOST_EPS` that is called a bound.

    These do not:

    - P-POTS is weighted by one over its density; quantiles and views leave every row's t uniform.
    - Prompts, ends of documents that are not eligible and the first token with --mdm-shift are
      always visible: the bound is that of all others, given these.
    - --mdm-pad-eligible and --mdm-pad-response-to-multiple-of: the bound is that of the padded
      response, which generation writes as well.
    - --mdm-random-length-fraction: the bound is that of the texts as they were cut.
    - --mdm-isolate-documents with one rate a row: masks of a part of a row are masks of that part.
    - Attention that is still opening (--mdm-anneal-attention-iters), or that leaves tokens out, and
      dropout change the network: the bound is that of the network as it is in training.

    Args:
        mdm: settings of the objective.
        uniform_share: of the bell in use, or its mean over the rows that a loss is the mean over;
            1 where the density is no bell.
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
        f"eps {mdm.eps:g}": mdm.mask == "bernoulli" and mdm.eps > MOST_EPS,
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds) or None


def bound_in_words(mdm: MDMConfig) -> str | None:
    """What a run says when it starts; None: its training loss is a bound from the start.

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
    """A share below 1, with two places or more if it is small; 1.00 would contradict it."""
    return f"{share:.2g}" if share < 0.01 else f"{min(share, 0.99):.2f}"
