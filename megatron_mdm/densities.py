"""The density of the masking rate for given settings."""

from megatron_mdm.config import MDMConfig
from megatron_mdm.objective.bells import Bell
from megatron_mdm.objective.ppots.fit_file import load_sampler
from megatron_mdm.objective.samplers import Clipped, Flat, RateSampler, Uniform


def fixed_sampler(mdm: MDMConfig) -> RateSampler:
    """The density of t for a run that does not fit a density itself.

    Args:
        mdm: the settings. For a bell that fades, this function gives the initial density, and
            `Bell.with_share(share)` derives the later densities from it.
    """
    if mdm.bell is not None:
        return Bell.of(*mdm.bell, mdm.bell_role, mdm.bell_uniform_share)
    if mdm.rate_sampler == "flat":
        return Flat()
    if mdm.rate_sampler == "clipped":
        assert mdm.clip is not None
        return Clipped(*mdm.clip)
    if mdm.rate_sampler == "ppots":
        assert mdm.ppots_file is not None  # without a file, the run fits the density itself
        return load_sampler(mdm.ppots_file).sampler()
    return Uniform()
