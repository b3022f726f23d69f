"""Wheel and source distribution: what is in them, and what an index shows of the README."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

from megatron_mdm import __version__
from tests import ROOT

NAME = f"megatron_mdm-{__version__}"
BUILD = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
FILES = ["setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"]
FOLDERS = ["megatron_mdm", "tools", "examples", "tests"]
IGNORED = ["__pycache__", "*.py[cod]", "runs", "build", "dist", "*.egg-info"]  # by git
# A link or an image of Markdown or HTML that leads to a file of the repository, or to a heading.
RELATIVE = re.compile(r"""\]\((?!https?:)|\b(?:src|srcset|href)=["'](?!https?:)""")


def build(source):
    """Builds both, without network, in a copy of the source; the folder that has them."""
    run = subprocess.run([sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return source / "dist"


def metadata(dist):
    with zipfile.ZipFile(dist / f"{NAME}-py3-none-any.whl") as wheel:
        text = wheel.read(f"{NAME}.dist-info/METADATA").decode()
    return email.message_from_string(text)


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns(*IGNORED)
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    return build(source)


def files_of(*folders):
    """The files of the repository in these folders, but for what git ignores."""
    return {
        path.relative_to(ROOT).as_posix()
        for name in folders
        for path in (ROOT / name).rglob("*")
        if path.is_file()
        and not any(fnmatch(part, x) for part in path.relative_to(ROOT).parts for x in IGNORED)
    }


def test_a_wheel_has_the_package_alone(dist):
    with zipfile.ZipFile(dist / f"{NAME}-py3-none-any.whl") as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = {x for x in files_of("megatron_mdm") if x.endswith(".py")}
    assert names == package | {"megatron_mdm/py.typed"}


def test_a_source_distribution_has_all_sources(dist):
    with tarfile.open(dist / f"{NAME}.tar.gz") as sdist:
        names = {name.removeprefix(f"{NAME}/") for name in sdist.getnames()}
    assert {*FILES, *files_of(*FOLDERS)} <= names
    assert not any(name.endswith(".pyc") for name in names)


def test_the_programs_of_a_wheel_are_found(dist, tmp_path):
    with zipfile.ZipFile(dist / f"{NAME}-py3-none-any.whl") as wheel:
        wheel.extractall(tmp_path)
    code = "import megatron_mdm.pretrain as p, megatron_mdm.launch; print(p.__file__)"
    run = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert Path(run.stdout.strip()) == tmp_path / "megatron_mdm/pretrain.py", run.stderr


def test_what_an_index_shows(dist):
    found = metadata(dist)
    assert found["Summary"].startswith("Stable training of masked-diffusion language models")
    assert found["Description-Content-Type"] == "text/markdown"
    assert set(found.get_all("Provides-Extra")) == {"gpu", "plot", "hf", "eval", "test"}
    assert found["License-File"] == "LICENSE"
    assert not RELATIVE.search(found.get_payload())


README = """\
# Title [![ci](https://x.org/ci.svg)](https://x.org) [![python](https://x.org/p.svg)](setup.py)

<picture>
  <source srcset="examples/dark.png">
  <img alt="variance" src="examples/light.png">
</picture>

See [the *flags* page](megatron_mdm/FLAGS.md#masks), [below](#below) and [the paper](https://x.org).

![loss](examples/loss.png)

<img alt="loss" src="examples/loss.png"> and <img src="https://x.org/a.png">

## Below
"""


def test_relative_links_become_text(tmp_path):
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    package = tmp_path / "megatron_mdm"
    package.mkdir()
    shutil.copy(ROOT / "megatron_mdm/__init__.py", package)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "CHANGELOG.md").touch()
    assert metadata(build(tmp_path)).get_payload().strip() == (
        "# Title [![ci](https://x.org/ci.svg)](https://x.org) ![python](https://x.org/p.svg)\n\n"
        "See the *flags* page, below and [the paper](https://x.org).\n\n"
        ' and <img src="https://x.org/a.png">\n\n'
        "## Below"
    )
