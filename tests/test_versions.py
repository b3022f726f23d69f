"""Which versions are tested, tried with a warning, or refused before Megatron is imported."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_mdm import versions
from megatron_mdm.errors import UserError
from megatron_mdm.versions import Tested, check_megatron, installed, release
from tests import ROOT
from tests.mcore.flags.parsing import COMMON

NEWER = "warning: megatron-core 0.20.0 is newer than the tested versions, 0.19.0 to 0.19.2; if it "


@pytest.mark.parametrize(
    "version", ["0.19.0", "0.19.0rc0", "0.19.0+abc", "0.19.0a1", "0.19", "0.19.0a0+eb6.nv26.01"]
)
def test_a_release_has_no_suffixes(version):
    assert release(version) == (0, 19, 0)


def test_a_range_ends_at_the_precision_in_which_it_is_written():
    python, megatron = Tested("Python", "3.12", "3.12"), Tested("megatron-core", "0.19.0", "0.19.2")
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


def test_a_newer_checkout_trains_and_the_first_rank_warns_once(checkout):
    """The rank has a worker that writes checkpoints, which imports the package again."""
    newer = checkout("0.20.0rc1")
    words = ["-m", "megatron_mdm.pretrain", *COMMON, "--mock-data", "--train-iters", "1"]
    saved = ["--save", "checkpoint", "--save-interval", "1", "--async-save"]
    run = python(newer, *words, "--split", "1,0,0", *saved)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "iteration        1/       1" in run.stdout
    assert run.stderr.count("is newer than the tested versions") == 1
    assert "warning: megatron-core 0.20.0rc1 is newer" in run.stderr
    other = python(newer, "-c", "import megatron_mdm.mcore", RANK="1")
    assert (other.returncode, other.stdout, other.stderr) == (0, "", "")


def test_an_older_checkout_is_refused_by_the_program_a_tool_and_the_plugin(checkout):
    older = checkout("0.18.0")
    line = f"megatron-core 0.18.0 in {older}/megatron/core has no megatron.training.models.gpt, "
    program = python(older, "-m", "megatron_mdm.pretrain", *COMMON)
    (older / "run").mkdir()
    tool = python(older, str(ROOT / "tools/evaluate.py"), "--load", "run", "--device", "cpu")
    for run in (program, tool):
        assert run.returncode == 2, run.stderr[-3000:]
        assert run.stderr.startswith(f"error: {line}") and run.stderr.count("\n") == 1
    plugin = python(older, "-c", "import megatron_mdm.plugin")
    assert plugin.returncode == 1
    assert plugin.stderr.splitlines()[-1].startswith(f"megatron_mdm.errors.UserError: {line}")
