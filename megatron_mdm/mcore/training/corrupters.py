"""The corrupters that mask the rows of a run, in training and in evaluations."""

from megatron_mdm.config import MDMConfig
from megatron_mdm.objective.corruption import Corrupter, Sampler
from megatron_mdm.objective.samplers import Uniform


def training_corrupter(mdm: MDMConfig, sampler: Sampler) -> Corrupter:
    """The corrupter of training rows.

    Args:
        mdm: settings of the objective.
        sampler: maps quantiles to rates t and importance weights, for any density of t.
    """
    assert mdm.mask_token_id is not None  # after `finalize_args`
    return Corrupter(
        sampler=sampler,
        mask_kind=mdm.mask,
        mask_token_id=mdm.mask_token_id,
        eps=mdm.eps,
        isad_token_ids=tuple(mdm.isad_token_ids or ()),
        isad_delta=mdm.isad_delta,
        isad_weight=mdm.isad_weight,
    )


def evaluation_corrupter(mdm: MDMConfig) -> Corrupter:
    """The corrupter of evaluation rows.

    Every evaluation estimates the NELBO with uniform rates and exact-count masks, whatever the
    training uses. NELBOs of runs with different training settings can therefore be compared.
    Exact-count masks have the least variance.
    """
    assert mdm.mask_token_id is not None
    return Corrupter(Uniform(), "exact-count", mdm.mask_token_id, mdm.eps)
