"""Libraries and GPUs that single features need.

The checks of flags and `megatron_mdm.doctor` share these conditions. This module imports neither
torch nor Megatron.
"""

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Library:
    """A library that some features need."""

    name: str
    """Its name in messages."""

    module: str
    """A top-level module of it."""

    install: str
    """The command that installs it, or the place that has the command."""

    def is_installed(self) -> bool:
        """Whether Python finds the module, which is not imported."""
        return importlib.util.find_spec(self.module) is not None


# Packages of setup.py that every run needs, beside torch and Megatron. Their modules have the same
# names. An installation with --no-deps leaves them out.
REQUIRED = (
    *("numpy", "packaging", "scipy", "sentencepiece", "psutil", "omegaconf", "tensorboard"),
    "tqdm",
)
# No command: it depends on the CUDA version, and would replace the build of a container.
TRANSFORMER_ENGINE = Library(
    "Transformer Engine", "transformer_engine", "README.md, section Install"
)
# The modules of apex that Megatron's own layers use. The package `apex` in the registry is another
# project.
APEX = (
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_ALL_CONTRIB_EXT=1 pip install -v --no-build-isolation "
    "git+https://github.com/NVIDIA/apex"
)
ACCUMULATES_GRADIENTS = Library("NVIDIA's apex", "fused_weight_gradient_mlp_cuda", APEX)
SOFTMAX = Library("NVIDIA's apex", "scaled_masked_softmax_cuda", APEX)
RESILIENCY = Library(
    "nvidia-resiliency-ext", "nvidia_resiliency_ext", "pip install 'nvidia-resiliency-ext>=0.6'"
)
TENSORBOARD = Library("TensorBoard", "tensorboard", "pip install tensorboard")
TRANSFORMERS = Library("transformers", "transformers", "pip install 'megatron-mdm[hf]'")
LM_EVAL = Library("lm-evaluation-harness", "lm_eval", "pip install 'megatron-mdm[eval]'")
MATPLOTLIB = Library("matplotlib", "matplotlib", "pip install 'megatron-mdm[plot]'")

# Fusions that Megatron turns on by default, and the libraries of which one must provide each.
FUSED_BY = {
    "apply_rope_fusion": [TRANSFORMER_ENGINE],
    "gradient_accumulation_fusion": [TRANSFORMER_ENGINE, ACCUMULATES_GRADIENTS],
    "masked_softmax_fusion": [SOFTMAX],
}

# The last version of transformers that the released code of LLaDA, LLaDA-MoE and Dream was
# published for. `from_pretrained` of transformers 5 cannot load that code.
RELEASED_CODE_RUNS_WITH = "4.57.1"


@dataclass(frozen=True)
class Fp8Recipe:
    """The GPU and the CUDA version that Transformer Engine requires for a recipe."""

    least: tuple[int, int]
    """The lowest compute capability."""

    below: tuple[int, int] | None = None
    """All compute capabilities are lower than this one."""

    cuda: tuple[int, int] = (12, 1)
    """The lowest CUDA version."""


# Source: the support checks of transformer_engine/pytorch/quantization.py, version 2.14.
FP8_RECIPES = {
    "delayed": Fp8Recipe((8, 9)),
    "tensorwise": Fp8Recipe((8, 9)),
    "blockwise": Fp8Recipe((9, 0), cuda=(12, 9)),
    "mxfp8": Fp8Recipe((10, 0), below=(12, 0)),
}
FP4_RECIPES = {"nvfp4": Fp8Recipe((10, 0))}


def fp8_obstacle(recipe: str, capability: tuple[int, int], cuda: tuple[int, ...]) -> str | None:
    """The condition of Transformer Engine that a recipe does not meet; None if it meets all.

    Args:
        recipe: value of --fp8-recipe or --fp4-recipe. A recipe without an entry has the conditions
            of `delayed`.
        capability: compute capability of the GPU.
        cuda: CUDA version of torch.
    """
    needed = (FP8_RECIPES | FP4_RECIPES).get(recipe, FP8_RECIPES["delayed"])
    if capability < needed.least or (needed.below and capability >= needed.below):
        below = f", below {_dotted(needed.below)}" if needed.below else ""
        return (
            f"needs a GPU of compute capability {_dotted(needed.least)}{below}, this one has "
            f"{_dotted(capability)}"
        )
    if cuda[:2] < needed.cuda:
        return f"needs CUDA {_dotted(needed.cuda)}, this torch has {_dotted(cuda)}"
    return None


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
