"""Names of the bell densities and ranges of their parameters; without torch, for the flags."""

from megatron_mdm.errors import UserError

# Names of the bells, with the lowest and the highest value of each parameter. A narrower bell falls
# between the edges of the table, and a wider bell reaches beyond them. A Beta with A or B below 1
# is not bell-shaped.
BELLS = {
    "logit-normal": {"MEAN": (-3.0, 3.0), "STD": (0.1, 3.0)},
    "beta": {"A": (1.0, 100.0), "B": (1.0, 100.0)},
}
# Lowest uniform share of a bell in the role `proposal`. It bounds the weights by 1/share. Without a
# uniform share their variance is infinite for most bells.
LEAST_PROPOSAL_SHARE = 0.1


def check_bell(name: str, parameters: list[float]) -> None:
    """Checks the parameters of a bell: the table represents only bells within these ranges.

    Args:
        name: `logit-normal` or `beta`.
        parameters: mean and standard deviation of logit t, or A and B of a Beta.

    Raises:
        UserError: there are too few or too many parameters, or one is out of range.
    """
    ranges = BELLS[name]
    if len(parameters) != len(ranges):
        raise UserError(f"--mdm-{name} takes {' and '.join(ranges)}, got {len(parameters)} numbers")
    for (parameter, (least, most)), value in zip(ranges.items(), parameters, strict=True):
        if not least <= value <= most:
            raise UserError(
                f"{parameter} of --mdm-{name} must lie in [{least:g}, {most:g}], got {value}"
            )
