"""The table of objective/README.md names functions, flags and tests that exist."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_mdm.config import MDMConfig, flag_of

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_mdm"
TEXT = (PACKAGE / "objective/README.md").read_text(encoding="utf-8")
START = TEXT.index("| item |")  # the guide has other tables before this one, and none after it
HEAD, _, *LINES = [line for line in TEXT[START:].splitlines() if line.startswith("|")]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES]


def definitions(path):
    """Names that a module defines, with methods as `Class.method`."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{x.name}" for x in node.body if isinstance(x, ast.FunctionDef)}
    return names


def test_every_row_has_all_columns():
    assert HEAD == "| item | source | formula | function | flag | test |"
    assert len(ROWS) > 20 and all(len(row) == 6 for row in ROWS)
    assert all(row[0] and row[1] and row[2] for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_function_flag_and_test_of_an_item_exist(row):
    _, _, _, functions, flags, tests = row
    assert re.fullmatch(r"`[^`]+`(, `[^`]+`)*", functions) and re.fullmatch(r"`\w+`", tests)
    settings = {flag_of(field.name) for field in fields(MDMConfig)}
    for words in (name.split() for name in re.findall(r"`(.+?)`", flags)):
        if words[0].startswith("--"):
            assert len(words) == 1 and words[0] in settings
        else:
            tool = (ROOT / words[0]).read_text(encoding="utf-8")
            assert all(f'"{word}"' in tool for word in words[1:])
    pattern = re.compile(rf"^def {tests.strip('`')}\(", re.M)
    found = [p for p in (ROOT / "tests").rglob("test_*.py") if pattern.search(p.read_text())]
    assert len(found) == 1


def test_functions_that_the_text_names_exist():
    named = re.findall(r"`([\w/]+\.py): ([\w.]+)`", TEXT)
    assert len(named) > len(ROWS)
    for path, name in named:
        assert name in definitions(PACKAGE / path), f"{path}: {name}"


def test_tests_that_the_text_names_exist():
    sources = [p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py")]
    for name in re.findall(r"`(test_\w+)`", TEXT):
        assert any(f"def {name}(" in source for source in sources), name
