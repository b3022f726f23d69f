"""Which versions are tested, tried with a warning, or refused before Megatron is imported."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_mdm import versions
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.flags import arguments
from megatron_mdm.versions import (
    check_megatron,
    check_transformer_engine,
    installed,
    release,
)
from tests import ROOT
from tests.mcore.flags.parsing import COMMON, parsed

READ = "the versions whose sources were read, 2.14 to 2.20"
NEWER = "warning: megatron-core 0.20.0 is newer than the tested versions, 0.19.0 to 0.19.2; if it "


@pytest.mark.parametrize(
    "version", ["0.19.0", "0.19.0rc0", "0.19.0+abc", "0.19.0a1", "0.19", "0.19.0a0+eb6.nv26.01"]
)
def test_a_release_has_no_suffixes(version):
    assert release(version) == (0, 19, 0)


def test_a_range_ends_at_the_precision_in_which_it_is_written():
    python = versions.Tested("Python", "3.12", "3.12")
    megatron = versions.Tested("megatron-core", "0.19.0", "0.19.2")
    assert python.includes("3.12.9") and python.is_newer("3.13.0") and python.is_older("3.11.9")
    assert megatron.includes("0.19.0rc0") and megatron.includes("0.19.2+cu13")
    assert megatron.is_newer("0.19.10") and megatron.is_newer("1.0") and megatron.is_older("0.18.2")
    assert str(python) == "3.12" and str(megatron) == "0.19.0 to 0.19.2"


def test_the_installed_versions_are_those_that_python_imports():
    import megatron.core
    import torch

    assert installed("Python") == ".".join(map(str, sys.version_info[:3]))
    assert release(installed("torch")) == release(torch.__version__)
    assert release(installed("megatron-core")) == release(megatron.core.__version__)
    assert installed("no-such-package") is None


def test_the_tested_versions_are_those_of_the_constraints():
    lines = (ROOT / "examples/constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    for tested in versions.TESTED.values():
        if tested.name in pinned:
            assert tested.includes(pinned[tested.name]), tested


def test_the_guide_names_the_range():
    text = (ROOT / "megatron_mdm/mcore/README.md").read_text()
    assert f"megatron-core {versions.MEGATRON} " in " ".join(text.split())


def test_pip_takes_a_version_that_is_tried_with_a_warning():
    needed = [
        Requirement(line.strip().split('"')[1])
        for line in (ROOT / "setup.py").read_text().splitlines()
        if line.strip().startswith('"megatron-core')
    ]
    (megatron,) = needed
    assert all(megatron.specifier.contains(v) for v in (versions.MEGATRON.first, "0.19.3", "0.20"))
    assert not megatron.specifier.contains("0.18.2")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (
            "0.18.2",
            "megatron-core 0.18.2 in .*/megatron/core has no megatron.training.models.gpt, ",
        ),
        ("0.17.1", "megatron-core 0.17.1 in .* which the model needs: pip install --no-deps mega"),
        (None, "megatron-core is not installed: pip install --no-deps megatron-core==0.19.2"),
    ],
)
def test_a_version_that_lacks_a_part_is_refused_by_name(version, message, monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda name: version)
    with pytest.raises(UserError, match=f"^{message}"):
        check_megatron()


def test_tested_versions_pass_and_newer_ones_warn(monkeypatch):
    for version in ("0.19.0", "0.19.0rc0", "0.19.1", "0.19.2+cu13"):
        monkeypatch.setattr(versions, "installed", lambda name, version=version: version)
        assert check_megatron() is None
    monkeypatch.setattr(versions, "installed", lambda name: "0.20.0")
    assert check_megatron() == f"{NEWER}fails: pip install --no-deps megatron-core==0.19.2"


@pytest.mark.parametrize(
    ("version", "flags", "line"),
    [
        # NeMo 26.08, NGC PyTorch 26.06, the registry, NeMo 26.04
        ("2.17.1+4329ff84", "--fp8-recipe blockwise", None),
        ("2.16.0+4220403e", "--fp8-recipe mxfp8", None),
        ("2.20.2", "--fp4-format", None),
        ("2.14.0+71bbefb", "--fp8-recipe tensorwise", None),
        ("2.21.0.dev0+abc", "", f"2.21.0.dev0+abc is newer than {READ}"),
        ("3.0", "", f"3.0 is newer than {READ}"),
        ("2.12", "", f"2.12 is older than {READ}"),
        ("2.1", "--fp8-recipe delayed", f"2.1 is older than {READ}"),
    ],
)
def test_transformer_engine_outside_of_the_range_warns(version, flags, line, monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda name: version)
    found = check_transformer_engine([flags])
    assert found == (line and f"warning: transformer-engine {line}")


@pytest.mark.parametrize(
    ("version", "flag", "name"),
    [
        ("2.0", "--fp8-recipe mxfp8", "MXFP8BlockScaling"),
        ("2.1.0+abc", "--fp8-recipe tensorwise", "Float8CurrentScaling"),
        ("2.2.1", "--fp8-recipe blockwise", "Float8BlockScaling"),
        ("2.7", "--fp4-format", "NVFP4BlockScaling"),
    ],
)
def test_transformer_engine_without_a_part_is_refused_for_its_flag(
    version, flag, name, monkeypatch
):
    monkeypatch.setattr(versions, "installed", lambda name: version)
    words = f"^transformer-engine {re.escape(version)} has no {name}, which {flag} needs and which "
    with pytest.raises(UserError, match=words):
        check_transformer_engine(["--bf16", flag])
    assert check_transformer_engine(["--bf16"]) is not None  # older than the range


def test_the_flags_of_a_run_reach_the_check(monkeypatch, capsys):
    args = parsed(monkeypatch, *"--fp8-format hybrid --fp8-recipe blockwise".split())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(versions, "installed", lambda name: "2.2")
    with pytest.raises(UserError, match="2.2 has no Float8BlockScaling"):
        arguments.validate_flags(args)
    monkeypatch.setattr(versions, "installed", lambda name: "2.21")
    layers = parsed(monkeypatch, "--transformer-impl", "transformer_engine")
    arguments.validate_flags(layers)
    line = "2.21 is newer than the versions whose sources were read"
    assert capsys.readouterr().err.count(line) == 1
    monkeypatch.setenv("RANK", "1")
    arguments.validate_flags(layers)
    arguments.validate_flags(parsed(monkeypatch))  # local layers do not use it
    assert capsys.readouterr().err == ""


@pytest.fixture
def checkout(tmp_path):
    """Makes a folder with the files of the installed Megatron that calls itself another version."""

    def make(version):
        core = tmp_path / version / "megatron/core"
        core.mkdir(parents=True)
        source = Path(find_spec("megatron.core").origin).parent
        for file in source.iterdir():
            if file.name not in ("package_info.py", "__pycache__"):
                (core / file.name).symlink_to(file)
        info = (source / "package_info.py").read_text()
        assert "__version__ = " in info
        # Megatron's other modules read the constants, which stay.
        (core / "package_info.py").write_text(f"{info}\n__version__ = '{version}'\n")
        return core.parents[1]

    return make


def python(folder, *words, **variables):
    """Runs Python with a checkout of Megatron before the installed one."""
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    environment = os.environ | variables | {"PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True, text=True, timeout=120, env=environment, cwd=folder,
    )  # fmt: skip


def test_a_newer_checkout_trains_with_one_warning(checkout):
    newer = checkout("0.20.0rc1")
    words = ["-m", "megatron_mdm.pretrain", *COMMON, "--mock-data", "--train-iters", "1"]
    run = python(newer, *words, "--split", "1,0,0")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "iteration        1/       1" in run.stdout
    assert run.stderr.count("warning: megatron-core 0.20.0rc1 is newer than the tested versi") == 1


def test_only_the_first_rank_warns_and_not_the_processes_that_it_spawns(checkout):
    """Such as the writer of checkpoints, which imports the package again."""
    newer = checkout("0.20.0rc1")
    code = (
        "import importlib, multiprocessing, megatron_mdm.mcore\n"
        "start = multiprocessing.get_context('spawn').Process\n"
        "child = start(target=importlib.import_module, args=('megatron_mdm.mcore',))\n"
        "child.start(); child.join(); print(child.exitcode)"
    )
    first, second = (python(newer, "-c", code, RANK=rank) for rank in "01")
    assert first.stdout == second.stdout == "0\n", first.stderr + second.stderr
    assert first.stderr.startswith("warning: ") and first.stderr.count("\n") == 1
    assert not second.stderr


def test_an_older_checkout_is_refused_by_the_program_a_tool_and_the_plugin(checkout):
    older = checkout("0.18.0")
    line = f"megatron-core 0.18.0 in {older}/megatron/core has no megatron.training.models.gpt, "
    program = python(older, "-m", "megatron_mdm.pretrain", *COMMON)
    (older / "run").mkdir()
    tool = python(older, str(ROOT / "tools/evaluate.py"), "--load", "run", "--data", "x")
    for run in (program, tool):
        assert run.returncode == 2, run.stderr[-3000:]
        assert run.stderr.startswith(f"error: {line}") and run.stderr.count("\n") == 1
    plugin = python(older, "-c", "import megatron_mdm.plugin")
    assert plugin.returncode == 1
    assert plugin.stderr.splitlines()[-1].startswith(f"megatron_mdm.errors.UserError: {line}")
