"""tools/setup.sh: the installations that it asks pip for."""

import re
import shutil
import subprocess

import pytest

from megatron_mdm.versions import MEGATRON
from tests import ROOT

# Replaces the Python of .venv and records what pip is asked for.
PYTHON = """#!/bin/bash
[ "$2" != pip ] || echo "${@:3}" >>"$(dirname "$0")/../../asked"
[[ "$*" != *"$REFUSED"* ]]
"""


@pytest.fixture
def checkout(tmp_path):
    for name in ("tools/setup.sh", "setup.py", "examples/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text("")
    (programs / "python").write_text(PYTHON)
    (programs / "python").chmod(0o755)
    return tmp_path


def asked_for(checkout, extras, refused="nothing", setup="yes"):
    """(status, requests to pip without the options that all of them have)."""
    environment = {
        "SETUP": setup,
        **{"PATH": "/usr/bin:/bin", "HOME": str(checkout), "REFUSED": refused},
        "PYTHON": str(checkout / ".venv/bin/python"),
    }
    command = ["bash", "-c", f"source tools/setup.sh {extras}"]
    run = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    asked = checkout / "asked"
    lines = asked.read_text().splitlines() if asked.exists() else []
    asked.unlink(missing_ok=True)
    always = f"install -q --disable-pip-version-check -c {checkout}/examples/constraints.txt "
    assert all(line.startswith(always) for line in lines)
    return run.returncode, [line.removeprefix(always) for line in lines]


def test_transformer_engine_is_built_against_the_torch_that_was_installed_before_it(checkout):
    first = f"-e {checkout}[hf]"
    second = f"--no-build-isolation -e {checkout}[hf,gpu]"
    # A failed installation must be repeated.
    assert asked_for(checkout, "hf,gpu", refused="--no-build-isolation")[0] == 1
    assert asked_for(checkout, "hf,gpu") == (0, [first, "wheel ninja", second])
    assert asked_for(checkout, "hf,gpu") == (0, [])
    alone = f"--no-build-isolation -e {checkout}[gpu]"
    assert asked_for(checkout, "gpu") == (0, [f"-e {checkout}", "wheel ninja", alone])


def test_other_extras_are_installed_as_usual(checkout):
    assert asked_for(checkout, "hf") == (0, [f"-e {checkout}[hf]"])
    assert asked_for(checkout, "hf,plot") == (0, [f"-e {checkout}[hf,plot]"])


def test_setup_no_takes_the_active_environment(checkout):
    (checkout / ".venv/bin/activate").write_text("echo activated >>asked\n")
    assert asked_for(checkout, "hf,gpu", setup="no") == (0, [])
    assert sorted(path.name for path in (checkout / ".venv").iterdir()) == ["bin"]


def test_scripts_install_and_activate_through_setup_alone():
    """The kit for a first GPU is apart: it unpacks wheels into a folder of its own."""
    scripts = [path for path in (ROOT / "examples").rglob("*.sh") if path.parent.name != "kit"]
    assert {"quickstart.sh", "launch.sh", "common.sh", "sft.sh"} <= {path.name for path in scripts}
    for script in scripts:
        code = re.sub(r"^\s*#.*$", "", script.read_text(), flags=re.M)
        code = code.replace('fail "the pictures need matplotlib: pip install matplotlib"', "")
        assert not re.search(r"pip3? install|bin/activate|-m venv", code), script
        if ".venv" in code:
            assert 'python=.venv/bin/python\n[ "${SETUP:-yes}" != no ] || python=python' in code


def test_the_guide_of_containers_names_what_setup_py_needs():
    guide = (ROOT / "examples/containers/README.md").read_text()
    packaging = (ROOT / "setup.py").read_text()
    needed = set(re.findall(r'^ {8}"([a-z]+)[^":]*"(?!:)', packaging, re.M))
    assert {"numpy", "psutil", "tqdm"} <= needed
    lines = re.findall(r"python -m pip install (numpy .*matplotlib)", guide)
    assert len(lines) == 2  # with Docker and with Slurm
    for line in lines:
        assert set(line.split()) == (needed - {"torch", "megatron"}) | {
            "transformers",
            "matplotlib",
        }
    assert f"{MEGATRON.name}=={MEGATRON.last}" in guide
