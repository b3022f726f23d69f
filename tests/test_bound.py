"""What the program says about bounds, by flag and against density, weight and masks."""

import numpy as np
import pytest

from megatron_mdm.bound import bound_in_words, why_no_bound
from megatron_mdm.config import MDMConfig
from megatron_mdm.densities import fixed_sampler
from megatron_mdm.objective.control_variate import bin_masses

BELL = {"rate_sampler": "logit-normal", "logit_normal": [0.0, 0.5]}
BETA = {"rate_sampler": "beta", "beta": [2.0, 3.0]}
SFT = {"sft": True, "normalization": "rows"}
ISAD = {"isad_token_ids": [3, 4]}
NO_BOUND = {
    "clipped": {"rate_sampler": "clipped", "clip": [0.3, 0.8]},
    "flat": {"rate_sampler": "flat"},
    "bell, uniform share 0.10": BELL,
    "bell, uniform share 0.01": {**BETA, "bell_uniform_share": 0.01},
    "bell, uniform share 0.0005": {**BELL, "bell_uniform_share": 5e-4},
    "bell, uniform share 0.30": {**BELL, "bell_role": "weight", "bell_uniform_share": 0.3},
    "bell, uniform share 0.99": {**BELL, "bell_uniform_share": 1 - 1e-9},
    "ISAD with inclusion weights": ISAD,
    "SyRM": {**SFT, "syrm_fraction": 0.1},
    "flat; SyRM": {**SFT, "syrm_token_ids": [7], "rate_sampler": "flat"},
    "rates of documents that see each other": {"rate_per": "document"},
    "first tokens of blocks read noisy tokens": {
        **{"block_size": 4, "shift": True, "shift_first": "noisy"},
    },
    "confidence loss": {"confidence_loss": 0.5},
    "eps 0.3": {"eps": 0.3},
}
BOUND = {
    "defaults": {},
    "exact-count": {"mask": "exact-count", "eps": 0.3},
    "all rates": {"rate_sampler": "clipped", "clip": [0, 1]},
    "bell as proposal": {**BELL, "bell_role": "proposal"},
    "bell that is the uniform": {**BELL, "bell_uniform_share": 1.0},
    "weights that are 1": {**BETA, "bell_role": "weight", "bell_uniform_share": 1.0},
    "online P-POTS": {"rate_sampler": "ppots", "ppots_refit_interval": 50},
    "ISAD with the likelihood ratio": {**ISAD, "isad_weight": "exact"},
    "ISAD without a difference": {**ISAD, "isad_delta": 0.0},
    "fine-tuning of LLaDA": {**SFT, "pad_eligible": True},
    "packed pairs": {
        **{"sft": True, "isolate_documents": True, "rate_per": "document"},
        "pad_response_to_multiple_of": 8,
    },
    "documents alone": {"isolate_documents": True, "rate_per": "document"},
    "one rate for documents alone": {"isolate_documents": True},
    "blocks": {"block_size": 4, "mask": "exact-count", "ar_loss_weight": 0.5},
    "random lengths": {"random_length_fraction": 0.5},
    "attention that opens": {"anneal_attention_iters": 100},
    "ends that are visible": {"eod_eligible": False},
    "the first token that is visible": {"shift": True},
    "strata and mirrored views": {"quantiles": "strata", "views": 2},
}


@pytest.mark.parametrize("reason", NO_BOUND)
def test_what_changes_the_objective_is_no_bound(reason):
    mdm = MDMConfig(**NO_BOUND[reason])
    assert why_no_bound(mdm, mdm.bell_uniform_share) == reason
    assert bound_in_words(mdm) == (
        f"the training loss is no bound on the negative log-likelihood: {reason}. "
        "The NELBO of evaluations is one"
    )


@pytest.mark.parametrize("name", BOUND)
def test_what_leaves_the_objective_is_a_bound(name):
    mdm = MDMConfig(**BOUND[name])
    assert why_no_bound(mdm, mdm.bell_uniform_share) is None
    assert bound_in_words(mdm) is None


@pytest.mark.parametrize("name", [*NO_BOUND, *BOUND])
def test_the_word_is_that_of_density_times_weight(name):
    """test_unbiasedness.py and test_segments.py of tests/objective cover masks and contexts."""
    mdm = MDMConfig(**(NO_BOUND | BOUND)[name])
    if mdm.rate_sampler == "ppots":
        return  # each run has its own fits
    is_constant = np.allclose(bin_masses(fixed_sampler(mdm), 50), 1 / 50, rtol=0, atol=1e-12)
    of_rates = MDMConfig(
        **{x: getattr(mdm, x) for x in ("rate_sampler", "clip", "logit_normal", "beta")},
        bell_role=mdm.bell_role,
        bell_uniform_share=mdm.bell_uniform_share,
    )
    assert is_constant == (why_no_bound(of_rates, mdm.bell_uniform_share) is None)


def test_a_bell_that_fades_becomes_a_bound():
    mdm = MDMConfig(**BELL, bell_fade=[0.4, 0.7])
    for share in (0.1, 0.5, 1 - 1e-12):
        assert "bell" in why_no_bound(mdm, share)
    assert why_no_bound(mdm, 1.0) is None
    assert bound_in_words(mdm) == (
        "the training loss is no bound on the negative log-likelihood: bell, uniform share 0.10. "
        "It becomes one when --mdm-bell-fade has brought the uniform share to 1; the NELBO of "
        "evaluations is one all along"
    )
    assert bound_in_words(MDMConfig(**BELL, bell_fade=[0.0, 0.0])) is None  # faded from the start
    mdm = MDMConfig(**BELL, bell_fade=[0.4, 0.7], rate_per="document")
    assert why_no_bound(mdm, 1.0) == "rates of documents that see each other"
    assert bound_in_words(mdm) == (
        "the training loss is no bound on the negative log-likelihood: bell, uniform share 0.10; "
        "rates of documents that see each other; when --mdm-bell-fade has brought the uniform "
        "share to 1, still for rates of documents that see each other. The NELBO of evaluations "
        "is one"
    )
