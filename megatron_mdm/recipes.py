"""Named sets of flags: what `--mdm-recipe` stands for."""

import sys
from argparse import ArgumentParser, Namespace

from megatron_mdm.config import MDMConfig, flag

# Iterations between fits of P-POTS, when the run fits its own density. Early in training the second
# moments move fast, and a fit costs about as much as a log line.
_REFIT_INTERVAL = 50

RECIPES: dict[str, dict[str, object]] = {
    # Without any of the methods, as LLaDA and Dream were trained.
    "standard": {
        "mdm_rate_sampler": "uniform",
        "mdm_quantiles": "iid",
        "mdm_mask": "bernoulli",
        "mdm_views": 1,
    },
    # P-POTS on the loss, and MIRROR.
    "paper": {
        "mdm_rate_sampler": "ppots",
        "mdm_ppots_refit_interval": _REFIT_INTERVAL,
        "mdm_ppots_target": "loss",
        "mdm_quantiles": "iid",
        "mdm_mask": "bernoulli",
        "mdm_views": 2,
    },
    # The clipped schedule of block diffusion (arXiv 2503.09573), another objective.
    "clipped": {
        "mdm_rate_sampler": "clipped",
        "mdm_clip": [0.3, 0.8],
        "mdm_quantiles": "iid",
        "mdm_mask": "bernoulli",
        "mdm_views": 1,
    },
    # What trained best of the unbiased ones at equal compute (tools/benchmark.py race).
    "recommended": {
        "mdm_rate_sampler": "ppots",
        "mdm_ppots_refit_interval": _REFIT_INTERVAL,
        "mdm_ppots_target": "gradient",
        "mdm_quantiles": "lattice",
        "mdm_mask": "exact-count",
        "mdm_views": 1,
    },
}


def set_recipe_defaults(parser: ArgumentParser) -> None:
    """Makes the flags of the recipe on the command line the parser's defaults.

    Flags given by hand win, being no defaults. Who takes another sampler of t by hand, or no fits
    while training, leaves the recipe's settings of these behind as well.
    """
    peek = ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--mdm-recipe")
    peek.add_argument("--mdm-rate-sampler")
    peek.add_argument("--mdm-ppots-refit-interval")
    given = peek.parse_known_args(sys.argv[1:])[0]
    settings = RECIPES.get(given.mdm_recipe, {})  # an unknown name is the real parser's to refuse
    left: tuple[str, ...] = ()
    if given.mdm_rate_sampler not in (None, settings.get("mdm_rate_sampler")):
        left = _SAMPLER_SETTINGS
    elif given.mdm_ppots_refit_interval == "0":
        left = ("mdm_ppots_",)
    parser.set_defaults(**{k: v for k, v in settings.items() if not k.startswith(left)})


_SAMPLER_SETTINGS = ("mdm_rate_sampler", "mdm_ppots_", "mdm_clip")


def expansion(args: Namespace | MDMConfig) -> str:
    """What the recipe of these arguments stands for, with the values in use, as flags."""
    words = []
    for name, value in RECIPES[args.mdm_recipe].items():  # type: ignore[index]
        used = getattr(args, name)
        text = " ".join(map(str, used)) if isinstance(used, list) else str(used)
        words.append(f"{flag(name)} {text}" + ("" if used == value else " (by hand)"))
    return ", ".join(words)
