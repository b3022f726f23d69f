"""Named sets of flags: what `--mdm-recipe` stands for."""

import sys
from argparse import ArgumentParser, Namespace

from megatron_mdm.config import flag

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
    sampler = given.mdm_rate_sampler or settings.get("mdm_rate_sampler")
    left = _left_behind(settings, sampler, given.mdm_ppots_refit_interval != "0")
    parser.set_defaults(**{k: v for k, v in settings.items() if k not in left})


def _left_behind(settings: dict[str, object], sampler: object, is_fitted: bool) -> set[str]:
    """What of a recipe has no use with the sampler of t in use, or without fits while training."""
    prefixes: tuple[str, ...] = ()
    if sampler != settings.get("mdm_rate_sampler"):
        prefixes = ("mdm_ppots_", "mdm_clip")
    elif not is_fitted:
        prefixes = ("mdm_ppots_target",)
    return {name for name in settings if name.startswith(prefixes)}


def expansion(args: Namespace) -> str:
    """What the recipe of these arguments stands for, with the values in use, as flags."""
    settings = RECIPES[args.mdm_recipe]
    left = _left_behind(settings, args.mdm_rate_sampler, args.mdm_ppots_refit_interval != 0)
    words = []
    for name, value in settings.items():
        if name in left:
            continue
        used = getattr(args, name)
        text = " ".join(map(str, used)) if isinstance(used, list) else str(used)
        words.append(f"{flag(name)} {text}" + ("" if used == value else " (by hand)"))
    return ", ".join(words)
