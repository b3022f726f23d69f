"""tools/README.md names every tool, and its examples have flags that the tools know."""

import re
import shlex

import pytest

from tests import ROOT

TEXT = (ROOT / "tools/README.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(\w+\.py)` \|.*\| `python tools/(.+)` \|$", TEXT, re.M))


def test_every_tool_has_a_line():
    assert sorted(ROWS) == sorted(path.name for path in (ROOT / "tools").glob("*.py"))
    assert all(f"`{path.name}`" in TEXT for path in (ROOT / "tools").glob("*.sh"))


@pytest.mark.parametrize("name", ROWS)
def test_an_example_is_of_its_tool_and_has_its_flags(name):
    script, *words = shlex.split(ROWS[name])
    assert script == name
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tools").rglob("*.py")]
    sources.append((ROOT / "megatron_mdm/checkpoint.py").read_text(encoding="utf-8"))
    for word in words:
        assert not word.startswith("--") or any(f'"{word}"' in source for source in sources), word


def test_headings_that_it_links_to_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    headings = [line.strip("# ").lower().replace(" ", "-") for line in readme.splitlines()]
    for anchor in re.findall(r"\(\.\./README\.md#([\w-]+)\)", TEXT):
        assert anchor in headings, anchor
