"""Recipes as users give them, and how their flags combine with others."""

import re
import sys
from argparse import ArgumentParser, Namespace

import pytest

from megatron_mdm.bound import why_no_bound
from megatron_mdm.config import MDMConfig, destination
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.flags import arguments
from megatron_mdm.recipes import METHODS, RECIPES, expansion, settings_of
from tests import ranks


def parse(monkeypatch, *flags):
    """The settings of a command line, after its checks."""
    argv = [*ranks.MODEL, *ranks.TOKENIZER, *ranks.TRAINING, "--mock-data", *flags]
    monkeypatch.setattr(sys, "argv", ["pretrain", *argv])
    args = arguments.parse_args(arguments.add_arguments)
    arguments.validate_flags(args)
    return MDMConfig.from_args(args)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_its_flags(monkeypatch, name):
    config = parse(monkeypatch, "--mdm-recipe", name)
    settings = {**RECIPES[name], "recipe": name, "device": "cpu"}
    assert config == MDMConfig(**settings, mask_token_id=ranks.MASK_ID)
    assert parse(monkeypatch, f"--mdm-recipe={name}") == config


def test_recipes_stand_for_these_flags():
    fit = "--mdm-rate-sampler ppots, --mdm-ppots-refit-interval 50, --mdm-ppots-target"
    plain = "--mdm-quantiles iid, --mdm-mask bernoulli, --mdm-views"
    flags = {
        "standard": f"--mdm-rate-sampler uniform, {plain} 1",
        "paper": f"{fit} loss, {plain} 2",
        "clipped": f"--mdm-rate-sampler clipped, --mdm-clip 0.3 0.8, {plain} 1",
        "ppots": f"{fit} gradient, --mdm-quantiles lattice, --mdm-mask exact-count, --mdm-views 1",
        "recommended": "--mdm-rate-sampler logit-normal, --mdm-logit-normal 0.0 0.5, "
        "--mdm-bell-uniform-share 0.01, --mdm-bell-fade 0.7 0.9, --mdm-quantiles lattice, "
        "--mdm-mask exact-count, --mdm-views 1",
    }
    for name, settings in RECIPES.items():
        given = {destination(key): value for key, value in settings.items()}
        args = {"mdm_ppots_refit_interval": 0, "mdm_bell_role": "objective"}
        args |= {**given, "mdm_recipe": name}
        assert expansion(Namespace(**args)) == flags[name]
    assert set(flags) == set(RECIPES)


def test_the_help_says_whose_loss_is_no_bound():
    parser = arguments.add_arguments(ArgumentParser())
    text = next(x.help for x in parser._actions if x.dest == "mdm_recipe")
    clauses = dict(re.findall(r"`(\w+)` ([^;]+)", text))
    assert set(clauses) == set(RECIPES)
    for name, clause in clauses.items():
        mdm = MDMConfig(**RECIPES[name])
        is_bound = why_no_bound(mdm, mdm.bell_uniform_share) is None
        assert ("no bound" in clause) == (not is_bound), name


def test_methods_are_joined_in_any_order():
    joined = settings_of("exact-count+ppots-gradient+lattice")
    assert joined == settings_of("ppots") == RECIPES["ppots"]
    assert list(joined) == list(RECIPES["ppots"])
    for name in METHODS:
        MDMConfig(**settings_of(name))
    for name in ("ppots-gradient+bell-fade", "bell-fade+ppots-gradient"):
        takes_over = MDMConfig(**settings_of(name))
        assert (takes_over.rate_sampler, takes_over.ppots_target) == ("logit-normal", "gradient")
    with pytest.raises(KeyError):
        settings_of("lattice+exact count")


def test_flags_given_by_hand_win(monkeypatch, tmp_path):
    config = parse(monkeypatch, "--mdm-recipe", "paper", "--mdm-views", "1")
    assert (config.views, config.ppots_target) == (1, "loss")
    # With another sampler, settings that belong to the recipe's sampler are dropped.
    config = parse(monkeypatch, "--mdm-recipe", "paper", "--mdm-rate-sampler", "uniform")
    assert (config.views, config.ppots_refit_interval) == (2, 0)
    config = parse(
        monkeypatch, "--mdm-recipe", "paper", *"--mdm-rate-sampler clipped --mdm-clip 0 0.5".split()
    )
    assert (config.views, config.clip) == (2, [0.0, 0.5])
    # The same holds for a density that is not refitted.
    fixed = "--mdm-ppots-refit-interval 0 --mdm-ppots-file x.json".split()
    config = parse(monkeypatch, "--mdm-recipe", "ppots", *fixed)
    assert (config.rate_sampler, config.ppots_target) == ("ppots", "loss")
    assert (config.mask, config.ppots_refit_interval) == ("exact-count", 0)


def test_flags_given_by_hand_win_over_a_bell_that_fades(monkeypatch):
    def parsed(*flags):
        return parse(monkeypatch, "--mdm-recipe", "recommended", *flags)

    for refits in ([], ["--mdm-ppots-refit-interval", "0"]):
        file = ["--mdm-rate-sampler", "ppots", "--mdm-ppots-file", "x.json"]
        config = parsed(*file, *refits)
        assert (config.rate_sampler, config.bell_fade) == ("ppots", None)
        assert (config.mask, config.ppots_target) == ("exact-count", "loss")
    config = parsed("--mdm-ppots-refit-interval", "50")  # P-POTS takes over
    assert (config.rate_sampler, config.bell_fade) == ("logit-normal", [0.7, 0.9])
    assert parsed("--mdm-bell-fade", "0.5", "0.5").bell_fade == [0.5, 0.5]
    config = parsed("--mdm-rate-sampler", "beta", "--mdm-beta", "3", "3")
    assert (config.logit_normal, config.bell_fade) == (None, [0.7, 0.9])
    for role in ("proposal", "weight"):
        config = parsed("--mdm-bell-role", role)
        assert (config.bell_fade, config.bell_uniform_share) == (None, 0.1)
        assert config.logit_normal == [0.0, 0.5]


def test_a_recipe_says_what_is_used_of_it(monkeypatch):
    def said(*flags):
        config = parse(monkeypatch, "--mdm-recipe", "paper", *flags)
        return expansion(Namespace(**config.arguments()))

    rest = "--mdm-quantiles iid, --mdm-mask bernoulli, --mdm-views 2"
    assert said("--mdm-rate-sampler", "uniform") == f"--mdm-rate-sampler uniform (by hand), {rest}"
    fixed = "--mdm-ppots-refit-interval 0 --mdm-ppots-file x.json".split()
    assert said(*fixed) == (
        f"--mdm-rate-sampler ppots, --mdm-ppots-refit-interval 0 (by hand), {rest}"
    )


def test_contradictions_are_named_with_the_recipe(monkeypatch):
    for recipe in ("ppots", "recommended"):
        message = f"needs --mdm-mask bernoulli.*--mdm-recipe {recipe}: "
        with pytest.raises(UserError, match=message):
            parse(monkeypatch, "--mdm-recipe", recipe, "--mdm-isad-token-ids", "3")
    with pytest.raises(UserError, match="needs --mdm-rate-sampler ppots.*--mdm-recipe clipped: "):
        parse(monkeypatch, "--mdm-recipe", "clipped", "--mdm-ppots-file", "x.json")
    views = "--micro-batch-size 1 is not a multiple of --mdm-views 2.*--mdm-recipe paper: "
    with pytest.raises(UserError, match=views):
        parse(monkeypatch, "--mdm-recipe", "paper", "--micro-batch-size", "1")
    # An error that has nothing to do with the recipe's flags does not name the recipe.
    with pytest.raises(UserError, match="--mdm-mask-token-id must not be negative, got -1$"):
        parse(monkeypatch, "--mdm-recipe", "paper", "--mdm-mask-token-id", "-1")
    with pytest.raises(UserError, match=r"--global-batch-size 3 is .* ranks$"):
        parse(monkeypatch, "--mdm-recipe", "clipped", "--global-batch-size", "3")
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--mdm-recipe", "best")
