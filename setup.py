"""Packaging of megatron_mdm; the versions that were tested stand in examples/constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_mdm/__init__.py").read_text())[1]

setup(
    name="megatron-mdm",
    version=VERSION,
    description="Masked-diffusion language-model training for NVIDIA Megatron",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_mdm", "megatron_mdm.*"]),
    package_data={"megatron_mdm": ["py.typed"]},  # its annotations are for others too
    install_requires=[
        "megatron-core>=0.19.2,<0.20",
        "torch>=2.6",
        "numpy",
        "scipy",
        "sentencepiece",
        # What megatron.training imports without declaring it:
        "psutil",  # checkpoint saving
        "omegaconf",  # configuration files
        "tensorboard",  # --tensorboard-dir
        # Read-out of TensorBoard logs, progress bars:
        "tqdm",
    ],
    extras_require={
        # To be installed after torch, with --no-build-isolation: see README.
        "gpu": ["transformer-engine[core_cu13,pytorch]"],
        "plot": ["matplotlib"],
        "hf": ["transformers"],
        # Its tasks, metrics and `datasets`; what single tasks need beside is in extras of its own.
        "eval": ["lm-eval>=0.4.13"],
        "test": [
            *("pytest", "pytest-timeout", "pytest-xdist", "ruff", "mypy"),
            *("matplotlib", "transformers", "lm-eval>=0.4.13", "markdown-it-py"),
        ],
    },
)
