"""Which bells there are, and which the table of a bell holds; without torch, as flags need them."""

from megatron_mdm.errors import UserError

# The bells by name, and the least and the most of their parameters. A narrower one falls between
# the edges of the table, and a wider one ends beyond them; a Beta below 1 is no bell.
BELLS = {
    "logit-normal": {"MEAN": (-3.0, 3.0), "STD": (0.1, 3.0)},
    "beta": {"A": (1.0, 100.0), "B": (1.0, 100.0)},
}
# The weights of a proposal are at most one over its uniform share: without one they have no mean.
LEAST_PROPOSAL_SHARE = 0.1


def check_bell(name: str, parameters: list[float]) -> None:
    """Checks the parameters of a bell: only bells that the table holds are sampled as they are.

    Args:
        name: `logit-normal` or `beta`.
        parameters: mean and standard deviation of the normal logit of t, or A and B of a Beta.

    Raises:
        UserError: one of them is out of range.
    """
    ranges = BELLS[name]
    if len(parameters) != len(ranges):
        raise UserError(f"--mdm-{name} takes {' and '.join(ranges)}, got {len(parameters)} numbers")
    for (parameter, (least, most)), value in zip(ranges.items(), parameters, strict=True):
        if not least <= value <= most:
            raise UserError(
                f"{parameter} of --mdm-{name} must lie in [{least:g}, {most:g}], got {value}"
            )
