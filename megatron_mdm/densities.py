"""The density of the masking rate that settings ask for."""

from megatron_mdm.config import MDMConfig
from megatron_mdm.objective.bells import Bell
from megatron_mdm.objective.ppots.fit_file import load_sampler
from megatron_mdm.objective.samplers import Clipped, Flat, RateSampler, Uniform


def fixed_sampler(mdm: MDMConfig) -> RateSampler:
    """The density of t, where a run does not fit one itself.

    Args:
        mdm: the settings. Of a bell that fades it is the first density, and
            `Bell.with_share(share)` makes later ones of it.
    """
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
