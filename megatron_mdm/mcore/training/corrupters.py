"""What masks the rows of a run, in training and in evaluations."""

from megatron_mdm.config import MDMConfig
from megatron_mdm.objective.corruption import Corrupter, Sampler
from megatron_mdm.objective.samplers import Uniform


def training_corrupter(mdm: MDMConfig, sampler: Sampler) -> Corrupter:
    """What masks the rows of training, with any density of t."""
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
    """What masks the rows of evaluations.

    Evaluations estimate the NELBO always alike, with uniform rates and exact-count masks, which
    have the least variance: numbers of runs that train differently can then be compared.
    """
    assert mdm.mask_token_id is not None
    return Corrupter(Uniform(), "exact-count", mdm.mask_token_id, mdm.eps)
