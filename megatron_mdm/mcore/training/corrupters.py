"""What masks the rows of a run, in training and in evaluations, and the density of t."""

from megatron_mdm.config import MDMConfig
from megatron_mdm.objective.bells import Bell
from megatron_mdm.objective.corruption import Corrupter, Sampler
from megatron_mdm.objective.ppots.fit_file import load_sampler
from megatron_mdm.objective.samplers import Clipped, Flat, RateSampler, Uniform


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


def fixed_sampler(mdm: MDMConfig) -> RateSampler:
    """The density of t, where the run does not fit one itself; of a bell that fades the first."""
    if mdm.bell is not None:
        return Bell.of(*mdm.bell, mdm.bell_role, mdm.bell_uniform_share)
    if mdm.rate_sampler == "flat":
        return Flat()
    if mdm.rate_sampler == "clipped":
        assert mdm.clip is not None
        return Clipped(*mdm.clip)
    if mdm.rate_sampler == "ppots":
        assert mdm.ppots_file is not None  # without one it is refitted
        return load_sampler(mdm.ppots_file).sampler()
    return Uniform()
