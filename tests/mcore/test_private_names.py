"""The list of names that are not public: the installed versions have them, and nothing is left out.

The second is read from the source. It sees imports of private names, private attributes that no
class of ours defines, private methods that override those of another package, and names that are
replaced by `replaced` or by an assignment to a module.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import megatron_mdm
from megatron_mdm.mcore import device, private_names
from megatron_mdm.mcore.private_names import PRIVATE_NAMES, missing
from tests import HAS_TRANSFORMER_ENGINE

PACKAGE = Path(megatron_mdm.__file__).parent
SOURCES = {
    path: ast.parse(path.read_text(encoding="utf-8"))
    for path in PACKAGE.rglob("*.py")
    if path != Path(private_names.__file__)
}
LISTED = {name for names in PRIVATE_NAMES.values() for name in names}
# Documented, although they begin with an underscore.
PUBLIC = {"_exit", "_replace", "_asdict"}
OTHERS = ("megatron.", "torch.", "argparse", "transformer_engine.")


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def defined(tree):
    """Names that a module defines, and attributes that it sets on its own objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


OWN = {name for tree in SOURCES.values() for name in defined(tree)} - LISTED


def used(tree):
    """Names of other packages in a module that have to stand in the list."""
    modules, own_modules = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "megatron_mdm":
            own_modules |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {alias.asname or alias.name for alias in node.names}
            yield from filter(is_private, (alias.name for alias in node.names))
    modules -= sys.stdlib_module_names
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_set = isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in modules
            if is_set or (is_private(node.attr) and node.attr not in OWN):
                yield node.attr
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "replaced"
            and ast.unparse(node.args[0]) not in own_modules
        ):
            yield from (x.value for x in node.args[1:2] if isinstance(x, ast.Constant))


def overridden():
    """Private methods of our classes that override those of another package."""
    for info in pkgutil.walk_packages(megatron_mdm.mcore.__path__, "megatron_mdm.mcore."):
        if info.name.endswith(".te_attention") and not HAS_TRANSFORMER_ENGINE:
            continue
        for _, kind in inspect.getmembers(importlib.import_module(info.name), inspect.isclass):
            if not kind.__module__.startswith("megatron_mdm."):
                continue
            bases = [b for b in kind.__mro__ if f"{b.__module__}.".startswith(OTHERS)]
            methods = [name for name, value in vars(kind).items() if inspect.isroutine(value)]
            for name in filter(is_private, methods):
                if any(name in vars(base) for base in bases):
                    yield name


def test_the_installed_versions_have_every_name():
    assert not missing()


def test_a_name_that_is_gone_is_reported():
    names = {
        "argparse:ArgumentParser": ("_actions", "_gone"),
        "torch.cuda": ("_lazy_init", "_gone"),
        "megatron.core.gone": ("name",),
        "megatron.core.rerun_state_machine:Gone": ("name",),
    }
    assert missing(names) == [
        "argparse.ArgumentParser._gone",
        "torch.cuda._gone",
        "megatron.core.gone.name",
        "megatron.core.rerun_state_machine.Gone.name",
    ]


def test_the_list_has_every_name_that_the_package_uses():
    assert set(overridden()) <= LISTED
    for path, tree in SOURCES.items():
        assert set(used(tree)) <= LISTED, path


def test_the_search_finds_names():
    text = (
        "from torch import _a\nfrom megatron.core import m\nimport argparse\n"
        "m.replacement = 1\nx._b\nsuper()._c()\n"
        "with replaced(m, 'd', 1): pass\n"
        "from megatron_mdm import own\nwith replaced(own, 'e', 1): pass\n"
    )
    assert set(used(ast.parse(text))) == {"_a", "replacement", "_b", "_c", "d"}


def test_the_list_has_the_names_of_the_cpu_mode():
    assert set(PRIVATE_NAMES["torch.cuda"]) == set(device._cuda_stand_ins())
    for owner, name, _ in device._megatron_repairs():
        module = inspect.ismodule(owner)
        key = owner.__name__ if module else f"{owner.__module__}:{owner.__name__}"
        assert name in PRIVATE_NAMES[key]


def test_no_name_in_the_list_is_unused():
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    words = set(re.findall(r"\w+", text))
    assert not LISTED - words
