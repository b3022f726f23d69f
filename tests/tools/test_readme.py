"""tools/README.md names every tool; tests/test_guides.py runs its examples."""

import re

from tests import ROOT

TEXT = (ROOT / "tools/README.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(\w+\.py)` \|.*\| `python tools/(.+)` \|$", TEXT, re.M))


def test_every_tool_has_a_line():
    assert sorted(ROWS) == sorted(path.name for path in (ROOT / "tools").glob("*.py"))
    assert all(example.split()[0] == name for name, example in ROWS.items())
    assert all(f"`{path.name}`" in TEXT for path in (ROOT / "tools").glob("*.sh"))
