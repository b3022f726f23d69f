"""The methods by name, their combinations, and the flags that `--mdm-recipe` stands for.

This is the only place that spells out combinations: the recipes, the variance report, the race, the
reproduction and the studies take theirs from `settings_of`.
"""

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from typing import Any

from megatron_mdm.config import MDMConfig, destination, flag_of
from megatron_mdm.objective.bell_limits import BELLS

# Iterations between fits of P-POTS if the run fits its own density. Early in training the second
# moments change fast, and a fit costs about as much as a log line.
_REFIT_INTERVAL = 50

_BELL = {"rate_sampler": "logit-normal", "logit_normal": [0.0, 0.5], "bell_uniform_share": 0.01}

# Fields of MDMConfig that each method sets in addition to those of `standard`.
METHODS: dict[str, dict[str, Any]] = {
    # None of the methods: LLaDA and Dream were trained so.
    "standard": {"rate_sampler": "uniform", "quantiles": "iid", "mask": "bernoulli", "views": 1},
    # The clipped schedule of block diffusion (arXiv 2503.09573). It changes the objective.
    "clipped": {"rate_sampler": "clipped", "clip": [0.3, 0.8]},
    # All masked tokens count about alike. It changes the objective.
    "flat": {"rate_sampler": "flat"},
    # Rates from a bell, without a weight. This changes the objective; those that fade end with the
    # exact one.
    "bell": _BELL,
    "bell-fade": {**_BELL, "bell_fade": [0.4, 0.7]},
    "bell-late": {**_BELL, "bell_fade": [0.7, 0.9]},
    # Rates from a bell, with one over its density as weight: the objective of `standard`.
    "proposal": {**_BELL, "bell_uniform_share": 0.1, "bell_role": "proposal"},
    "ppots-loss": {
        "rate_sampler": "ppots",
        "ppots_refit_interval": _REFIT_INTERVAL,
        "ppots_target": "loss",
    },
    "ppots-gradient": {
        "rate_sampler": "ppots",
        "ppots_refit_interval": _REFIT_INTERVAL,
        "ppots_target": "gradient",
    },
    "strata": {"quantiles": "strata"},
    "lattice": {"quantiles": "lattice"},
    "exact-count": {"mask": "exact-count"},
    "mirror": {"views": 2},
    "4-views": {"views": 4},
    "ema": {"ema_decay": 0.9},
    # These two also need ids of tokens, which depend on the tokenizer.
    "isad": {"isad_delta": 0.1},
    "syrm": {},
}
# The methods of each recipe.
COMBINATIONS = {
    "standard": "standard",
    "paper": "ppots-loss+mirror",
    "clipped": "clipped",
    # The meaning of `recommended` until 2026-11-29.
    "ppots": "ppots-gradient+lattice+exact-count",
    # It trained best at equal compute among those that end with the exact objective
    # (tools/benchmark.py race).
    "recommended": "bell-late+lattice+exact-count",
}


def settings_of(name: str) -> dict[str, Any]:
    """The settings of a recipe, of a method, or of several methods joined by `+`.

    Args:
        name: a key of `COMBINATIONS` or `METHODS`, or keys such as "lattice+exact-count".

    Returns:
        Values by the names of fields of MDMConfig, in the order of the fields.
    """
    settings: dict[str, Any] = dict(METHODS["standard"])
    parts = COMBINATIONS.get(name, name).split("+")
    # With a bell that fades, --mdm-rate-sampler names the bell, and P-POTS takes over at the end of
    # the fade. So the sampler of the bell must overwrite that of P-POTS.
    for part in sorted(parts, key=lambda part: METHODS[part].get("rate_sampler") != "ppots"):
        settings |= METHODS[part]
    return {x.name: settings[x.name] for x in fields(MDMConfig) if x.name in settings}


RECIPES = {name: settings_of(name) for name in COMBINATIONS}


def set_recipe_defaults(parser: ArgumentParser) -> None:
    """Makes the flags that the recipe on the command line stands for the parser's defaults.

    Flags on the command line win over defaults. If they name another sampler of t, no fits during
    training, or another role of a bell, the recipe's settings of the sampler, of the fits or of the
    fade are left out too.
    """
    peek = ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--mdm-recipe")
    peek.add_argument("--mdm-rate-sampler")
    peek.add_argument("--mdm-ppots-refit-interval")
    peek.add_argument("--mdm-bell-role", default="objective")
    given = peek.parse_known_args(sys.argv[1:])[0]
    settings = RECIPES.get(given.mdm_recipe, {})  # the real parser refuses an unknown name
    given.mdm_rate_sampler = given.mdm_rate_sampler or settings.get("rate_sampler")
    left = _left_behind(settings, given, given.mdm_ppots_refit_interval != "0")
    parser.set_defaults(**{destination(k): v for k, v in settings.items() if k not in left})


def _left_behind(settings: dict[str, Any], given: Namespace, is_fitted: bool) -> set[str]:
    """Settings of a recipe that do nothing, or are refused, beside the settings in use.

    Args:
        settings: settings of the recipe.
        given: the sampler of t and the role of a bell in use.
        is_fitted: whether the run fits its density.
    """
    prefixes: list[str] = []
    if given.mdm_rate_sampler != settings.get("rate_sampler"):
        prefixes += ["ppots_", "clip", "logit_normal", "beta"]
        if given.mdm_rate_sampler not in BELLS:
            prefixes.append("bell_")
    elif not is_fitted:
        prefixes.append("ppots_target")
    if given.mdm_bell_role != "objective":
        prefixes.append("bell_")  # only the objective fades, and a proposal needs a larger share
    return {name for name in settings if name.startswith(tuple(prefixes))}


def expansion(args: Namespace) -> str:
    """The flags that the recipe of these arguments stands for, with the values in use."""
    settings = RECIPES[args.mdm_recipe]
    left = _left_behind(settings, args, args.mdm_ppots_refit_interval != 0)
    words = []
    for name, value in settings.items():
        if name in left:
            continue
        used = getattr(args, destination(name))
        text = " ".join(map(str, used)) if isinstance(used, list) else str(used)
        words.append(f"{flag_of(name)} {text}" + ("" if used == value else " (by hand)"))
    return ", ".join(words)
