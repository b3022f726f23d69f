"""The contenders of the race: settings of the objective, composed of methods, not of recipes.

The meaning of a recipe may change: the race decides what `recommended` means.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from megatron_mdm.experiments.runs import as_flags
from megatron_mdm.files import write_text
from megatron_mdm.recipes import settings_of

_QUIET = "lattice+exact-count"  # the smallest variance for the same objective
_BELL = {"rate_sampler": "logit-normal", "bell_uniform_share": 0.01}


@dataclasses.dataclass(frozen=True)
class Contender:
    """A contender: the settings of an objective.

    Attributes:
        text: description for a table.
        methods: names of recipes.METHODS, joined by `+`.
        is_exact: whether its objective is the bound on the likelihood, at least at the end of
            training.
        fields: further fields of MDMConfig. DIRECTORY in a value stands for the race's directory.
        rate_of: contender whose tuned learning rate it uses; None: it has its own.
    """

    text: str
    methods: str
    is_exact: bool
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rate_of: str | None = None

    def flags(self, directory: pathlib.Path) -> list[str]:
        """Returns the contender's settings as flags of a run."""
        words = as_flags({**settings_of(self.methods), **self.fields})
        return [word.replace("DIRECTORY", str(directory)) for word in words]


# The contenders that the claims are about.
MAIN = {
    "standard": Contender("t uniform, independent rates and masks", "standard", True),
    "uniform": Contender("t uniform", _QUIET, True),
    "power": Contender(
        "density 0.9 t^-1/2 / 2 + 0.1, weighted by its inverse",
        _QUIET,
        True,
        {"rate_sampler": "ppots", "ppots_file": "DIRECTORY/density.json"},
    ),
    "clipped": Contender("t from 0.3 to 0.8", f"clipped+{_QUIET}", False),
    "bell": Contender("logit of t normal (0, 0.5), share 0.01 uniform", f"bell+{_QUIET}", False),
    "bell-fade": Contender("bell, uniform from 70% of the steps on", f"bell-fade+{_QUIET}", True),
    "bell-late": Contender("bell, uniform from 90% of the steps on", f"bell-late+{_QUIET}", True),
}
# The settings that `recommended` had when the race began. They are the recipe `ppots` now.
INCUMBENT = {
    "ppots": Contender("P-POTS on the gradient", f"ppots-gradient+{_QUIET}", True),
}
# Contenders with one seed each, outside the claims.
OTHERS = {
    "paper": Contender("P-POTS on the loss, MIRROR", "ppots-loss+mirror", True, {}, "standard"),
    "flat": Contender("masked tokens count alike", f"flat+{_QUIET}", False, {}, rate_of="clipped"),
    "beta": Contender(
        "bell Beta (3, 3)",
        _QUIET,
        False,
        {"rate_sampler": "beta", "beta": [3.0, 3.0], "bell_uniform_share": 0.01},
        rate_of="bell",
    ),
    "bell (0, 1)": Contender(
        "wider bell", _QUIET, False, {**_BELL, "logit_normal": [0.0, 1.0]}, rate_of="bell"
    ),
    "bell (-0.3, 0.5)": Contender(
        "bell at smaller t", _QUIET, False, {**_BELL, "logit_normal": [-0.3, 0.5]}, rate_of="bell"
    ),
    "bell (0, 0.35)": Contender(
        "narrower bell", _QUIET, False, {**_BELL, "logit_normal": [0.0, 0.35]}, rate_of="bell"
    ),
    "bell, share 0.1": Contender(
        "bell, a tenth uniform", f"bell+{_QUIET}", False, {"bell_uniform_share": 0.1}, "bell"
    ),
    "bell-fade, ppots": Contender(
        "bell-fade, then P-POTS on the gradient",
        f"bell-fade+{_QUIET}",
        True,
        {"ppots_refit_interval": 50, "ppots_target": "gradient"},
        rate_of="bell-fade",
    ),
}
CONTENDERS = {**MAIN, **OTHERS, **INCUMBENT}


def write_density(directory: pathlib.Path) -> None:
    """Writes the density of `power` as a file of --mdm-ppots-file."""
    from megatron_mdm.objective.ppots.fit import PpotsFit, tabulate
    from megatron_mdm.objective.ppots.fit_file import sampler_text
    from megatron_mdm.objective.ppots.moments import RateMoments
    from megatron_mdm.objective.samplers import mixture

    eps, uniform_share = 1e-3, 0.1
    table = mixture(*tabulate(lambda t: ((1 - eps) * t + eps) ** -0.5), uniform_share)
    fit = PpotsFit(
        "gradient",
        family="given",
        parameters={},
        kl=0.0,
        kls={},
        uniform_share=uniform_share,
        eps=eps,
        moments=RateMoments(1),
        table=table,
    )
    write_text(str(directory / "density.json"), sampler_text(fit))
