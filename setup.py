"""Packaging of megatron_mdm; the versions that were tested stand in examples/constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_mdm/__init__.py").read_text())[1]


def without_relative_links(text: str) -> str:
    """The README for a package index, which has none of the files that relative links lead to.

    Relative links become their text. Figures and relative images are left out.
    """
    text = re.sub(r"<picture>.*?</picture>\n*", "", text, flags=re.DOTALL)
    text = re.sub(r"""<img\b[^>]*\bsrc=["'](?!https?:)[^>]*>\n*""", "", text)
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    # The text of a link may be an image, such as a badge.
    return re.sub(r"\[((?:!\[[^\]]*\]\([^)]*\)|[^\]])*)\]\((?!https?:)[^)]*\)", r"\1", text)


class SourceDistribution(sdist):
    """The whole source: setuptools itself would leave out the tools and most of the tests."""

    def make_distribution(self) -> None:
        """Adds what is no part of the package."""
        for line in (
            *("include CHANGELOG.md", "graft tools", "graft examples", "graft tests"),
            *("recursive-include megatron_mdm *.md", "global-exclude *.py[cod]"),
        ):
            self.filelist.process_template_line(line)
        super().make_distribution()


setup(
    name="megatron-mdm",
    version=VERSION,
    description="Stable training of masked-diffusion language models on NVIDIA Megatron",
    long_description=without_relative_links((ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=[
        *("masked diffusion", "diffusion language models", "LLaDA", "Megatron", "pretraining"),
        *("variance reduction", "P-POTS", "MIRROR"),
    ],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    cmdclass={"sdist": SourceDistribution},
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_mdm", "megatron_mdm.*"]),
    package_data={"megatron_mdm": ["py.typed"]},  # its annotations are for others too
    install_requires=[
        "megatron-core>=0.19.0",  # a newer version than the tested ones starts with a warning
        "torch>=2.6",
        "numpy",
        "packaging",
        "scipy",
        "sentencepiece",
        # megatron.training imports these without declaring them:
        "psutil",  # checkpoint saving
        "omegaconf",  # configuration files
        "tensorboard",  # --tensorboard-dir
        # Progress bars:
        "tqdm",
    ],
    extras_require={
        # Installed after torch, with --no-build-isolation: see README.
        "gpu": ["transformer-engine[core_cu13,pytorch]"],
        "plot": ["matplotlib"],
        "hf": ["transformers"],
        # lm-eval brings its metrics and `datasets`. Single tasks may need extras of lm-eval's own.
        "eval": ["lm-eval>=0.4.13"],
        "test": [
            *("pytest", "pytest-timeout", "pytest-xdist", "ruff", "mypy"),
            *("matplotlib", "transformers", "lm-eval>=0.4.13", "markdown-it-py"),
        ],
    },
)
