"""The tests, and the environment that their processes need before they import Megatron.

While Megatron is imported, it uses every library that it finds. One of them is Transformer Engine,
whose optimizers and kernels need a GPU. Processes that compute on the CPU (pytest's own process and
most ranks) therefore hide Transformer Engine first, as `megatron_mdm.pretrain` does. The fork
server of the ranks hides the GPU as well, because a fork of a process that has looked for a GPU
cannot use it.

This module switches torch.compile off. Ranks and tools that may use a GPU run with torch.compile,
as users run them: see `ranks.users_environment`.
"""

import os
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
HAS_TRANSFORMER_ENGINE = find_spec("transformer_engine") is not None

# The user's own setting. Workers of pytest-xdist inherit the environment after their parent changed
# it.
os.environ.setdefault("MDM_TEST_COMPILE_DISABLE", os.environ.get("TORCH_COMPILE_DISABLE", ""))
if os.environ.get("MDM_TEST_RANKS") != "with Transformer Engine":  # set by ranks.launch
    from megatron_mdm.environment import prepare_environment

    prepare_environment("cpu")
if os.environ.get("MDM_TEST_RANKS") == "on the CPU":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
