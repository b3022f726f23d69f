"""The guides of the package and of the examples describe the tree as it is."""

import re

from tests import ROOT
from tests.test_import_order import MODULES, ORDER

PACKAGE = ROOT / "megatron_mdm"
TEXT = (PACKAGE / "README.md").read_text(encoding="utf-8")


def block(name):
    """The lines of a marked block of the tour, without their common indent."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", TEXT, re.DOTALL)
    return [line.removeprefix("    ") for line in found[1].splitlines()]


def test_the_tree_has_every_module_once():
    folders, names = [], []
    for line in block("tree"):
        depth = (len(line) - len(line.lstrip())) // 2
        name, *text = line.split(maxsplit=1)
        folders = folders[:depth]
        assert len(folders) == depth and (text or name.endswith("/"))
        if name.endswith("/"):
            folders.append(name[:-1])
            assert (PACKAGE / "/".join(folders) / "__init__.py").is_file()
        else:
            names.append("/".join([*folders, name]))
    paths = [path.relative_to(PACKAGE).as_posix() for path in MODULES.values()]
    assert sorted(names) == sorted(p for p in paths if not p.endswith("__init__.py"))


def test_the_order_of_imports_is_the_one_that_is_held():
    assert [line.split() for line in block("order")] == ORDER


def test_ten_files_are_read_first():
    found = re.findall(r"^\d+\. `([\w/.]+)`: ", TEXT, re.M)
    assert len(found) == 10
    assert all((PACKAGE / name).is_file() for name in found)


def test_the_binding_names_what_exists():
    text = (PACKAGE / "mcore/README.md").read_text(encoding="utf-8")
    folder = ""
    for line in (line for line in text.splitlines() if line.startswith("|")):
        folder = (re.findall(r"^\| `(\w+)/`", line) or [folder])[0]
        for file, name in re.findall(r"`(\w+\.py)(?:: (\w+))?`", line):
            source = (PACKAGE / "mcore" / folder / file).read_text(encoding="utf-8")
            assert not name or f"def {name}(" in source, f"{folder}/{file}: {name}"


def test_the_index_of_the_examples_has_every_script_and_folder():
    examples = ROOT / "examples"
    text = (examples / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    folders = [path for path in examples.iterdir() if path.is_dir()]
    assert all(any(link.startswith(f"{path.name}/") for link in links) for path in folders)
    scripts = {path.relative_to(examples).as_posix() for path in examples.rglob("*.sh")}
    # The rest are files that scripts source, and the kit, which gpu/README.md describes.
    assert scripts - set(links) == {"finetune/common.sh", "gpu/kit/device.sh", "progress.sh"}
