"""FLAGS.md, the page of all flags."""

import re
from argparse import ArgumentParser
from dataclasses import fields

from megatron_mdm.config import SECTIONS, MDMConfig
from megatron_mdm.mcore.flags import arguments, page
from tests import ROOT


def test_the_page_is_that_of_the_flags():
    made = (ROOT / "megatron_mdm/FLAGS.md").read_text(encoding="utf-8")
    assert made == page.page(), "python -m megatron_mdm.mcore.flags.page > megatron_mdm/FLAGS.md"


def test_every_field_is_in_one_section():
    names = [name for section in SECTIONS.values() for name in section]
    assert sorted(names) == sorted(field.name for field in fields(MDMConfig))


def test_every_flag_of_ours_is_in_the_table():
    parser = arguments.add_arguments(ArgumentParser())
    ours = [x.option_strings[0] for x in parser._actions if x.dest.startswith("mdm_")]
    assert len(ours) == len(fields(MDMConfig))
    shown = re.findall(r"^\| `(--[\w-]+)", page.page(), re.M)
    assert sorted(x for x in shown if "-mdm-" in x) == sorted(ours)


def test_settings_are_shown_as_the_flags_that_make_them():
    parser = ArgumentParser()
    parser.add_argument("--size", type=int, default=1)
    parser.add_argument("--no-cut", dest="cut", action="store_false")
    parser.add_argument("--paste", action="store_true")
    actions = parser._actions
    settings = {"size": 2, "cut": False, "paste": True}
    assert page._settings(actions, settings) == "`--size 2`, `--no-cut`, `--paste`"
    assert page._settings(actions, {"size": 1, "cut": True, "paste": False}) == ""
