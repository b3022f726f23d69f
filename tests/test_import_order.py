"""Imports only go down the order of the package's parts, read from the source of all modules."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import megatron_mdm

ROOT = Path(megatron_mdm.__file__).parent

# From the bottom up. A part may import only from parts in lines above its own line here.
ORDER = [
    ["errors", "file_locks", "hub_files", "interruption", "libraries"],
    ["objective"],
    ["environment", "versions", "files", "config"],
    ["recipes", "bound", "densities", "data", "pictures"],
    ["sizing", "evaluation", "generation"],
    ["variance"],
    ["mcore"],  # what every import of the binding runs first
    [
        *("mcore.ranks", "mcore.device", "mcore.argument_groups", "mcore.tokenizer"),
        "mcore.private_names",
    ],
    ["mcore.checkpoint"],
    ["mcore.flags"],
    ["mcore.data"],
    ["mcore.model"],
    ["mcore.training"],
    ["mcore.inference"],
    ["mcore.pretrain"],
    ["checkpoint", "plugin", "pretrain", "launch"],
    ["conversion", "lm_eval", "experiments"],
    ["doctor", "rehearse"],
]
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}

# Parts that use Megatron. Beside the binding, data writes Megatron's indexed datasets, sizing asks
# Megatron for memory, and experiments import it once for many runs.
USES_MEGATRON = {"mcore", "conversion", "data", "sizing", "experiments", "rehearse"}
OBJECTIVE_USES = {"torch", "numpy", "scipy", "megatron_mdm", *sys.stdlib_module_names}


def name_of(path: Path) -> str:
    """The name of a module in the package, such as mcore.model for mcore/model/__init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(tree: ast.AST) -> Iterator[str]:
    """Names that a tree imports, also in functions, but not under TYPE_CHECKING.

    `from a import b` gives a.b, which is a module or a name in a module.
    """
    if isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING":
        children = tree.orelse
    else:
        children = list(ast.iter_child_nodes(tree))
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names)
    elif isinstance(tree, ast.ImportFrom):
        assert tree.level == 0, "imports name the whole path"
        yield from (f"{tree.module}.{alias.name}" for alias in tree.names)
    for child in children:
        yield from imported(child)


def imports(path: Path) -> set[str]:
    """Names that a module imports."""
    return set(imported(ast.parse(path.read_text(encoding="utf-8"))))


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def own(name: str) -> str | None:
    """The package's module that an imported name is or belongs to, or None for other packages."""
    package, _, inside = name.partition(".")
    if package != "megatron_mdm":
        return None
    module = inside if inside in MODULES else inside.rpartition(".")[0]
    assert module in MODULES, name
    return module


# Module -> modules of the package that it imports.
ARROWS = {
    name: {target for x in found if (target := own(x)) is not None and target != name}
    for name, found in IMPORTS.items()
}


def part_of(module: str) -> str:
    """The part of a module, or "" for the package itself."""
    words = module.split(".")
    return ".".join(words[: 2 if words[0] == "mcore" else 1])


def test_imports_in_functions_count_and_those_for_annotations_do_not():
    text = "def f():\n    from a.b import c\nif TYPE_CHECKING:\n    import d\nelse:\n    import e"
    assert set(imported(ast.parse(text))) == {"a.b.c", "e"}


def test_every_part_has_a_place():
    assert {part_of(name) for name in MODULES} - {""} == set(LEVEL)


def test_imports_only_go_down():
    wrong = {
        (name, target)
        for name, targets in ARROWS.items()
        for target in targets
        if (source := part_of(name)) != (other := part_of(target))
        and other
        and LEVEL[other] >= LEVEL[source]
    }
    assert not wrong


def test_no_module_imports_itself_by_way_of_others():
    tuple(graphlib.TopologicalSorter(ARROWS).static_order())  # raises CycleError with the cycle


def test_few_parts_use_megatron():
    users = {
        name.split(".")[0]
        for name, found in IMPORTS.items()
        if any(x.split(".")[0] == "megatron" for x in found)
    }
    assert users == USES_MEGATRON


def test_the_package_imports_nothing_that_is_not_installed_with_it():
    found = {x.split(".")[0] for names in IMPORTS.values() for x in names}
    assert not found & {"tests", "tools", "benchmarks", "examples"}


def test_the_objective_is_torch_and_numpy():
    found = {x for name in MODULES if part_of(name) == "objective" for x in IMPORTS[name]}
    assert {x.split(".")[0] for x in found} <= OBJECTIVE_USES
    assert {part_of(m) for x in found if (m := own(x))} == {"objective", "errors"}


def test_objective_imports_neither_megatron_nor_what_lies_above_it():
    code = (
        "import sys, pkgutil, importlib, megatron_mdm.objective as o\n"
        "for m in pkgutil.walk_packages(o.__path__, o.__name__ + '.'):\n"
        "    importlib.import_module(m.name)\n"
        "assert 'megatron_mdm.objective.ppots.fit' in sys.modules\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'megatron']\n"
        "ours = {m.split('.')[1] for m in sys.modules if m.startswith('megatron_mdm.')}\n"
        "assert ours <= {'objective', 'errors'}, ours"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_runs_before_torch_does_not_import_it():
    names = "errors interruption environment files config recipes launch checkpoint".split()
    code = "import sys\n" + "".join(f"import megatron_mdm.{name}\n" for name in names)
    code += "assert not {'torch', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
